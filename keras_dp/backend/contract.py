"""What a backend owes: the names that the rest of the package imports from the door.

A backend is a folder beside this file, with a module that has these names and no
others. All that `keras.ops` can say stands outside of it, in `arithmetic` and in
`gradients`; here is what no common language exists for. Tensors are the
backend's own; (rows, ...) says that the examples lie along the first axis, and
the number of rows need not be known while a step is traced. "While a step is
traced" means nothing to a backend that runs every operation at once: what
concerns traced graphs may then do nothing.

Each entry: the name with its arguments; what they are, and what comes back.
A name with a dot in front is an attribute or method.
"""

from __future__ import annotations

CONTROL = {
    "branch(condition, on_true, on_false)": (
        "`on_true()` or `on_false()`, decided when the step runs by a scalar bool. Both return "
        "like structures of tensors, of like shapes and types."
    ),
    "require(condition, flag, message)": (
        "The scalar bool `flag`, if the scalar bool `condition` holds; else the step stops with "
        "the message. Where the compiler can't stop a step, false."
    ),
    "wait_for(tensors)": "A context in which nothing runs before these tensors are there.",
    "one_after_another(steps, since)": (
        "Has each step, of what it begins from and ends with, wait for those before, if it can. "
        "`since`: how many operations were there before the first."
    ),
    "added_up(compute, count, *, joined, carried)": (
        "A loop. `compute` makes of the scalar int32 numbers 0 to count - 1 tensors to add up, and "
        "tensors to keep. Returns two lists: sums, and what was kept, stacked along a new first "
        "axis, or joined along the first axis there is. Where tensors are `carried`, `compute` "
        "takes a list of them, too, and returns those for the next turn last. Only one turn is in "
        "memory at a time. Refuses (PrivacyError) what could keep or carry out what it sees."
    ),
    "map_rows(function, mapped)": (
        "A function of every row of a structure of tensors, (rows, ...), with its results stacked, "
        "(rows, ...). Vectorized while a step is traced. Raises NotImplementedError for what "
        "can't be, PrivacyError for what could keep or carry out what it sees."
    ),
    "once_traced(function)": (
        "The function, from a list of tensors to another, which may be traced once and then "
        "called: a saving, nothing else."
    ),
    "for_any_size(function, fixed, tensors)": (
        "`function(tensors, *fixed)`, a list, which may be traced once for tensors of all sizes "
        "and then called: a saving, nothing else."
    ),
    "seldom(function, tensors, like)": (
        "What a function makes of a list of tensors, prepared, where that can be, only when it is "
        "run: results of the shapes and types in `like`, pairs."
    ),
    "outside_graph()": "A context whose operations run at once, whatever is being traced.",
    "apart(compute)": "`compute()`, run at once, with gradients, while a step is traced.",
    "without_autograph(function)": "The function, which tracing is to take as it is written.",
    "compiled_candidate(engine, leaves, *, jit_compile, may_write, any_size)": (
        "An engine, from leaves to `(sums, norms, losses, rest)`, traced by itself for any number "
        "of rows, or for that of the leaves alone; raises whatever speaks against it. Refuses "
        "(PrivacyError) what could keep or carry out what it sees, unless it `may_write`."
    ),
    "prepared_quickly()": (
        "A context for every call of a train function: spares what only delays the first step."
    ),
    "BrokenMatmul(args)": "Raised where this build would multiply wrongly.",
}

CELLS = {
    "Counter(value)": (
        "An int64 that nothing saves or restores. On the host: `.read()`, `.set()`; in a step: "
        "`.tensor`, a scalar, `.increment()`."
    ),
    "Scalar(value)": (
        "A float64 likewise. On the host: `.read()`, `.set()`; in a step: `.tensor`, a scalar, "
        "`.assign()`."
    ),
    "Totals(shape)": (
        "float64 numbers likewise. In a step: `.add()`; on the host: `.take()`, the totals as an "
        "array, from then on zeros."
    ),
    "Table()": (
        "float64 numbers likewise. On the host: `.set()`, a sequence of them; in a step: `.at()`, "
        "the scalar at an int64 place, which stops the step if there is none."
    ),
    "Summaries(folder)": "A file of numbers by step, for TensorBoard: `.write()`, `.close()`.",
}

RANDOM = {
    "NoiseGenerator(state)": (
        "Gaussian noise from a generator with a key of its own, `.STATE_WORDS` int64 words, that "
        "no global seed reaches and nothing saves: `.rekey()`; in a step `.normal()`, from shapes, "
        "a type, float32 or float64, and a scalar standard deviation: a tensor for each shape, "
        "fresh each time."
    ),
    "call_numpy(function, inputs, like)": (
        "What a function makes of arrays, run in Python each time the step runs; tensors of the "
        "types and shapes of `like`, which may be specifications alone. What compiles may refuse "
        "it, but never leave it out."
    ),
    "runs_python()": (
        "Whether what is done or traced now may `call_numpy` at no loss: nothing compiles it, and "
        "its tensors are in the processor's memory."
    ),
    "fixed_normal(shape, seed, dtype)": (
        "Normal numbers of a floating-point type, always the same for a pair of numbers: only for "
        "what is made up."
    ),
    "per_example_seeds(states, rows, views)": (
        "For each Keras seed generator's state a seed for every example, (rows, 2), or "
        "(rows, views, 2), in the state's type. Advances each state once."
    ),
    "take_seeds(states)": "The states' values, a tensor each; advances each state once.",
    "seeds_from(values, rows, views, *, replica)": (
        "Of these, what `per_example_seeds` returns: other seeds for each replica's number."
    ),
}

BATCHES = {
    "as_tensors(leaves)": "The leaves of a batch as tensors; a ValueError for ragged or sparse.",
    "pad_examples(leaves, multiple)": (
        "The leaves, (rows, ...), with rows of zeros up to a positive multiple, and a bool mask, "
        "(rows,), true for real examples."
    ),
    "real_examples(tensor, rows)": "The first `rows` rows.",
    "read(variable)": "The value of a backend's variable as a tensor, read once for all its uses.",
    "copy_of(tensor)": "The same values in a tensor of its own, with a place of its own on tapes.",
    "of_known_sizes(tensor, sizes)": "The tensor, which is known to have these sizes (or `None`).",
    "of_open_length(tensor)": "The tensor, its number of rows forgotten while a step is traced.",
}

GRADIENTS = {
    "gradient_tape(*, persistent)": (
        "A context that records: `watch` tensors, then `gradient(targets, sources, "
        "output_gradients)`, of which each is `None` where nothing leads to it."
    ),
    "dense(gradient)": "A gradient as a tensor, also where it is that of a lookup.",
    "examples_can_be_channels()": (
        "Whether what is traced, or done, now may put examples among a convolution's channels at "
        "no loss."
    ),
    "filter_gradients(x, g, shape, strides, padding, dilation, groups)": (
        "Each example's gradient of a convolution's filters, (*kernel, channels, rows, filters), "
        "from inputs, (rows, *space, channels), and the gradient at the outputs, "
        "(rows, *space, filters). No example's numbers reach another's."
    ),
    "depthwise_filter_gradients(x, g, kernel, strides, padding, dilation)": (
        "The same of a depthwise convolution: (rows, *kernel, channels, multiplier)."
    ),
    "patches(x, kernel, strides, dilation)": (
        "What lies under a convolution's kernel, copied bit by bit: (rows, *space, positions of "
        "the kernel times channels). `None` where no operation does that."
    ),
}

ROUNDING = {
    "roundoff(tensor)": "By how much, relatively, one operation on its type rounds at most.",
    "least_square(tensor)": "Below which numbers of its type may become 0.",
    "exactly(product, a, b)": (
        "`product(a, b)`, linear in both, as exact as float32, whatever the device multiplies by."
    ),
    "squared_lengths(tensor)": (
        "The squared length of each vector along the last axis, in float64. Its sum, in any order, "
        "and a root are taken in the tensor's own type: off by n + 6 roundings at most."
    ),
    "products_off(tensor)": "By how much, relatively, a product in it is off at most.",
    "require_exact_arithmetic()": (
        "Raises PrivacyError where a setting computes float32 in half precision unseen."
    ),
}

LOOKING_THROUGH = {
    "current_graph()": "What is being traced; `None` while operations run at once.",
    "operation_count()": "How many operations it has so far; 0 for none.",
    "traced(function, *arguments)": (
        "The graph of what a function does with tensors like these; it doesn't run."
    ),
    "require_nothing_kept(graph, start, *, of)": (
        "Refuses (PrivacyError) a graph with an operation, from number `start` on, that could "
        "keep or carry out what it sees."
    ),
    "AsGraph(function, of)": "A function of tensors whose Python never sees a number.",
    "assertions_without_values()": "A context; errors of assertions leave out what they print.",
    "graphs_of(owners)": "A context; what is traced in it is freed when its owner is.",
    "keep_until_owner_goes(graph)": "Adds a graph to these.",
    "BatchAxis(examples, shared)": (
        "Follows examples through a traced graph: `.of()`, a state of a tensor, `.declare()`, and "
        "`.drawn_together`, the operations that draw once for all of them."
    ),
    "Rows(axis, each)": "A state: examples along an axis, each one's part from that one alone.",
    "Shared(value)": "A state: the same whatever the examples are.",
    "Mixed(why)": "A state: follows from several examples at once.",
    "Unknown(why, way_back)": "A state: nothing is known of it, or of its gradient.",
}

MEMORY = {
    "memory_left()": (
        "How many bytes of the processor's memory are left; `None` where another device computes, "
        "or where that can't be known."
    ),
    "memory_taken(compute)": (
        "Computes, and returns how many bytes that took at its height, of the processor's memory; "
        "`None` where that can't be known."
    ),
    "OutOfMemory(args)": "Raised where a device has too little memory for what it is to compute.",
}

HOST = {
    "gathering(parts, specs, epoch, steps)": "Batches of rows of arrays in memory, read ahead.",
    "reading(rows_of, specs, epoch, steps, *, chunk)": "Batches of rows that Python reads.",
    "one_by_one(batch_of, specs, epoch, steps)": (
        "Batches that Python reads whole, whose parts need not have as many rows as each other."
    ),
    "is_infinite(source)": "Whether a pipeline of the framework never ends.",
    "makes_batches(source)": "Whether its elements are batches, as far as can be seen.",
    "elements(source)": "Its elements, of NumPy arrays.",
    "dataset_length(source)": "How many batches it has, where it knows; else `None`.",
    "watch_checkpoints(seen)": (
        "Has every layer shown that a checkpoint of the framework's own is about to write."
    ),
}

REPLICAS = {
    "Replicas(strategy)": (
        "Replicas of a model on several devices. On the host: `.count`, `.workers`, the number of "
        "processes, of which one `.leads`, `.mine`, the numbers of those that this one feeds, "
        "`.from_chief()` and `.summed()`, which all processes call together, `.is_lost()`, "
        "`.metrics_of_evaluation()`, `.is_of()`, `.have()`, `.scope()`, `.feed()`, "
        "`.train_function()`, `.rest()`, once a `fit` is over. "
        "In a step: `.each()`, a function run on every replica, and of what it returned `.first()` "
        "and `.joined()`; inside of such a function `.total()`, sums over all replicas."
    ),
    "replicas_of(model)": (
        "The replicas that a model trains on, or `None` for none but itself; a PrivacyError where "
        "private training isn't known to be right."
    ),
    "replicas_within()": "How many replicas run what is done here.",
}

CONTRACT = (
    CONTROL
    | CELLS
    | RANDOM
    | BATCHES
    | GRADIENTS
    | ROUNDING
    | LOOKING_THROUGH
    | MEMORY
    | HOST
    | REPLICAS
)
NAMES = sorted(signature.partition("(")[0] for signature in CONTRACT)
