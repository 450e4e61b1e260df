"""Diagrams of the package: its wings, and a gradient's way through them."""

from canvas import Canvas


def wings() -> Canvas:
    """The package's parts, and the direction of imports."""
    canvas = Canvas(
        750,
        556,
        "The wings of the package",
        "Imports go one way: partitioned, tools, alias, transform and chain, "
        "then options, schedules and arguments, then stacks. Stacks import devices and algorithm. "
        "Devices import blocks, algorithm imports linalg, and all may import state.",
    )
    left, right, wide, narrow = 20, 310, 560, 270
    for style, name, purpose, x, y, width in (
        ("blue", "partitioned", "`soap_adamw`: SOAP and AdamW, with tools", left, 20, wide),
        ("grey", "tools", "beside the optimizer: describe, diagnostics, …", left, 80, wide),
        (
            "blue",
            "alias",
            "`soap`, `shampoo`: transform, weight decay, learning rate",
            left,
            140,
            wide,
        ),
        ("blue", "transform", "`scale_by_soap`, …", left, 200, narrow),
        ("blue", "chain", "clipping, decay, …", right, 200, narrow),
        ("blue", "options, schedules, arguments", "", left, 260, wide),
        ("green", "stacks", "all blocks of one shape: when, in which loop", left, 320, wide),
        ("orange", "devices", "the way on a mesh", left, 380, narrow),
        ("orange", "blocks", "the way on one device", left, 440, narrow),
        ("blue", "state", "the NamedTuples", left, 500, narrow),
        ("purple", "algorithm", "equations of a block", right, 380, narrow),
        ("purple", "linalg", "matrices only", right, 500, narrow),
        ("blue", "value_checks", "", 610, 500, 120),
    ):
        canvas.rectangle(x, y, width, 44, style)
        canvas.text(x + 14, y + 27, name, "label bold", 15, "start")
        if purpose:
            offset = 106 if len(name) < 11 else 122
            canvas.text(x + offset, y + 27, purpose, "label", 14, "start")
    canvas.text(310, 287, "user input, checked", "label", 14, "start")
    for y in (64, 124, 184, 244, 304):
        canvas.arrow((300, y), (300, y + 16))
    for x, y in ((155, 364), (445, 364), (155, 424), (155, 484)):
        canvas.arrow((x, y), (x, y + 16))
    canvas.arrow((445, 424), (445, 500))
    canvas.arrow((350, 424), (350, 464), (260, 500))
    canvas.arrow((580, 282), (670, 282), (670, 500))
    for number, line in enumerate(
        ("An arrow means", "“imports”: this", "part or others", "below it.")
    ):
        canvas.text(610, 70 + 18 * number, line, "muted", 13, "start")
    return canvas


def gradient() -> Canvas:
    """The way of a gradient through the functions of the package."""
    canvas = Canvas(
        750,
        640,
        "A gradient's way through the package",
        "update_fn checks and plans, then each stack is gathered, updated and split again. Adam's "
        "buckets go their own way. Leaves are put together from all blocks.",
    )
    canvas.rectangle(30, 194, 460, 330, "lane")
    canvas.rectangle(505, 194, 220, 330, "lane")
    canvas.text(42, 214, "for each block shape", "muted", 13, "start")
    canvas.text(517, 214, "for each bucket", "muted", 13, "start")
    canvas.text(260, 28, "gradients, a tree", "muted", 14)
    canvas.text(260, 628, "updates, the same tree", "muted", 14)
    for x, y, width, style, name, purpose in CALLS:
        canvas.box(x, y, width, 52, style, [f"`{name}`", purpose])
    _draw_update_stack(canvas)
    for start, end in ((34, 50), (102, 122), (174, 222), (274, 294), (440, 460), (512, 544)):
        canvas.arrow((260, start), (260, end))
    canvas.arrow((260, 596), (260, 612))
    canvas.arrow((460, 148), (615, 148), (615, 222))
    canvas.arrow((615, 274), (615, 340))
    canvas.arrow((615, 392), (615, 460))
    canvas.arrow((615, 512), (615, 570), (460, 570))
    return canvas


CALLS = (
    (60, 50, 400, "blue", "update_fn", "flattens the tree, and rebuilds it"),
    (
        60,
        122,
        400,
        "orange",
        "blocks.plan_of, devices.layout_of",
        "check the tree and the state, plan from shapes",
    ),
    (60, 222, 400, "orange", "layout.to_stack", "leaves to a stack, resharded on a mesh"),
    (60, 460, 400, "orange", "layout.from_stack", "a stack to blocks, resharded back"),
    (520, 222, 190, "orange", "blocks.gather", "leaves by shape"),
    (520, 340, 190, "green", "stacks.update_adam", "Adam, as one vector"),
    (520, 460, 190, "orange", "blocks.split", "leaves again"),
    (
        60,
        544,
        400,
        "orange",
        "blocks.scatter, layout.finish",
        "blocks to leaves, sharded as the parameters are",
    ),
)


def _draw_update_stack(canvas: Canvas) -> None:
    canvas.rectangle(60, 294, 400, 146, "green")
    canvas.text(260, 315, "`stacks.update_stack`", "label bold", 15)
    calls = (
        ("algorithm.is_acceptable", "reject NaN and overflow"),
        ("algorithm.refresh", "where a block is due"),
        ("algorithm.step_block", "moments and update"),
        ("algorithm.average_factor", "gradient to factors"),
    )
    for number, (name, purpose) in enumerate(calls):
        y = 324 + 28 * number
        canvas.rectangle(70, y, 380, 24, "purple", 4)
        canvas.text(80, y + 17, f"`{name}`", "label", 14, "start")
        canvas.text(288, y + 17, purpose, "label", 13, "start")
