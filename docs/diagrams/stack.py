"""Diagrams of stacks: parameters to stacks on one device, and on a mesh."""
# ruff: noqa: RUF001  (shapes have a times sign)

from canvas import Canvas, Point

UNIT = 40  # The length of 512 entries.
LEFT, RIGHT = 150, 500  # Of the parameters and of the state.


def stacks() -> Canvas:
    """From the parameters of a small transformer to stacks and buckets."""
    canvas = Canvas(
        750,
        558,
        "From parameters to stacks",
        "Two layers of a transformer with block_size=512. Attention matrices and the four tiles of "
        "each MLP matrix share the stack 512x512 of ten blocks. 512x128 matrices share another. "
        "Biases share a bucket, and a large vector has one to itself.",
    )
    head = "parameters, cut into blocks (`block_size=512`)"
    canvas.text(20, 34, head, "muted", 14, "start")
    canvas.text(RIGHT, 34, "state", "muted", 14, "start")
    ends: dict[str, list[Point]] = {"blue": [], "purple": [], "green": []}
    for layer in range(2):
        _draw_layer(canvas, layer, 52 + 222 * layer, ends)
    _draw_large_vector(canvas, 496)
    for (style, points), y in zip(ends.items(), (130, 282, 404), strict=True):
        for x, height in points:
            canvas.line((x, height), (424, height), (RIGHT - 30, y), style=style)
        canvas.arrow((RIGHT - 31, y), (RIGHT - 8, y), style=style)

    _draw_pile(canvas, 110, 10, "blue", UNIT)
    canvas.text(RIGHT + 138, 138, "10 blocks", "label bold", 14, "start")
    canvas.text(RIGHT, 190, '`stacks["512x512"]`', "label", 14, "start")
    canvas.text(RIGHT, 210, "two attention matrices, eight tiles", "muted", 13, "start")
    _draw_pile(canvas, 262, 2, "purple", UNIT / 4)
    canvas.text(RIGHT + 36, 288, "2 blocks", "label bold", 14, "start")
    canvas.text(RIGHT, 326, '`stacks["512x128"]`', "label", 14, "start")
    for bias in range(2):
        canvas.rectangle(RIGHT + 80 * bias, 398, 80, 12, "green", 2)
    canvas.text(RIGHT, 430, '`adam["float32"]`: a bucket', "label", 14, "start")
    canvas.text(RIGHT, 450, "small leaves share its vectors", "muted", 13, "start")
    return canvas


def _draw_layer(canvas: Canvas, layer: int, top: float, ends: dict[str, list[Point]]) -> None:
    canvas.rectangle(10, top, 400, 218, "lane")
    canvas.text(20, top + 20, f"`layer_{layer}`", "muted", 14, "start")
    y = top + 30
    for name, shape, style, tiles, width, height in (
        ("attention", "512×512", "blue", 1, UNIT, UNIT),
        ("key_value", "512×128", "purple", 1, UNIT / 4, UNIT),
        ("mlp", "512×2048", "blue", 4, UNIT, UNIT),
        ("bias", "2048", "green", 1, 4 * UNIT, 12),
    ):
        middle, end = y + height / 2, LEFT + tiles * width
        canvas.text(LEFT - 16, middle + 5, name, "label", 14, "end")
        for tile in range(tiles):
            canvas.rectangle(LEFT + tile * width, y, width, height, style, 2)
        canvas.text(end + 10, middle + 5, shape, "muted", 13, "start")
        ends[style].append((end + 76, middle))
        y += height + 12


def _draw_large_vector(canvas: Canvas, y: float) -> None:
    canvas.rectangle(10, y, 400, 40, "lane")
    canvas.text(LEFT - 16, y + 25, "logit_bias", "label", 14, "end")
    canvas.rectangle(LEFT, y + 14, 180, 12, "orange", 2)
    canvas.text(LEFT + 190, y + 25, "131072", "muted", 13, "start")
    canvas.arrow((LEFT + 246, y + 20), (RIGHT - 8, y + 20), style="orange")
    canvas.rectangle(RIGHT, y + 14, 225, 12, "orange", 2)
    canvas.text(RIGHT, y + 46, '`adam["131072"]`: its own vectors', "label", 14, "start")


def _draw_pile(canvas: Canvas, y: float, blocks: int, style: str, width: float) -> None:
    for block in range(blocks):
        canvas.rectangle(RIGHT + 9 * block, y + 2 * block, width, UNIT, style, 2)


def sharding() -> Canvas:
    """How gradients and updates move between parameters and a sharded stack."""
    canvas = Canvas(
        750,
        504,
        "A stack sharded along axis 0 over four devices",
        "Gradients are sharded as the parameters are, here by rows. They are resharded once, so "
        "that each device holds whole blocks. It steps and refreshes them without communication. "
        "Updates are resharded back.",
    )
    head = "eight gradients, each sharded by rows, as the parameters are"
    _draw_matrices(canvas, 30, head, "G")
    _draw_resharding(canvas, 122, "reshard (all-to-all)")
    for device, color in enumerate(DEVICE_COLORS):
        _draw_device(canvas, device, color)
    within = "one stack, sharded along axis 0 like its state: no communication here"
    canvas.text(375, 334, within, "muted", 14)
    _draw_resharding(canvas, 346, "reshard back")
    _draw_matrices(canvas, 404, "eight updates, sharded as the parameters are", "N")
    return canvas


DEVICE_COLORS = ("blue", "green", "orange", "purple")


def _draw_matrices(canvas: Canvas, y: float, head: str, letter: str) -> None:
    canvas.text(20, y, head, "label", 14, "start")
    for number in range(8):
        x = 20 + 90 * number
        for device, color in enumerate(DEVICE_COLORS):
            canvas.rectangle(x, y + 12 + 14 * device, 80, 14, color, 0)
        canvas.text(x + 40, y + 86, f"*{letter}*_{{{number}}}", "muted", 13)


def _draw_resharding(canvas: Canvas, y: float, text: str) -> None:
    for device in range(4):
        canvas.arrow((105 + 180 * device, y), (105 + 180 * device, y + 34))
    canvas.text(375, y + 22, text, "label", 14)


def _draw_device(canvas: Canvas, device: int, color: str) -> None:
    x, y, width = 20 + 180 * device, 162, 170
    canvas.rectangle(x, y, width, 148, "lane")
    canvas.text(x + width / 2, y + 24, f"device {device}", "label bold", 14)
    for block in range(2):
        canvas.rectangle(x + 10 + 80 * block, y + 34, 70, 56, color, 2)
        name = f"*G*_{{{2 * device + block}}}"
        canvas.text(x + 45 + 80 * block, y + 67, name, size=14)
    canvas.text(x + width / 2, y + 114, "step and refresh", "label", 14)
    canvas.text(x + width / 2, y + 134, "of its own blocks", "label", 14)
