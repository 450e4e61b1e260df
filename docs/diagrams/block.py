"""Diagrams of one block: a step, and the calls up to several refreshes."""
# ruff: noqa: RUF001  (formulas have signs such as a times and a prime)

from canvas import Canvas


def step() -> Canvas:
    """A step of SOAP for one block."""
    canvas = Canvas(
        750,
        440,
        "A step of SOAP for one block",
        "The gradient is rotated into the eigenbasis and enters both moments. Adam's direction is "
        "rotated back. The gradient also enters the factors, from which the bases are refreshed.",
    )
    canvas.text(115, 32, "parameters' coordinates", "muted", 14)
    canvas.text(605, 32, "eigenbasis' coordinates", "muted", 14)
    columns, rows, height = ((20, 190), (250, 190), (480, 250)), (48, 172, 296), 84
    for row, y in enumerate(rows):
        for (x, width), (style, *lines) in zip(columns, BOXES_OF_STEP[row], strict=True):
            canvas.box(x, y, width, height, style, lines)

    top, center, bottom = (y + height / 2 for y in rows)
    left, middle, right = (x + width / 2 for x, width in columns)
    canvas.arrow((210, top), (250, top))
    canvas.arrow((440, top), (480, top))
    canvas.arrow((right, 132), (right, 172))
    canvas.arrow((right, 256), (right, 296))
    canvas.arrow((480, bottom), (440, bottom))
    canvas.arrow((250, bottom), (210, bottom))
    canvas.arrow((left, 132), (left, 172))
    canvas.arrow((210, center), (250, center), style="plain dashed")
    canvas.arrow((middle, 172), (middle, 132))
    canvas.arrow((middle, 256), (middle, 296))

    canvas.line((20, 410), (56, 410))
    canvas.text(64, 415, "in every step", "muted", 14, "start")
    canvas.line((190, 410), (226, 410), style="plain dashed")
    legend = "a refresh, every *f* = `precondition_frequency` updates"
    canvas.text(234, 415, legend, "muted", 14, "start")
    return canvas


BOXES_OF_STEP = (
    (
        ("blue", "gradient *G*", "*m* × *n*"),
        ("grey", "1. rotate", "*G*′ = *Q*_{L}^{T} *G* *Q*_{R}"),
        ("green", "rotated gradient *G*′", "*m* × *n*"),
    ),
    (
        (
            "orange",
            "6. factors",
            "*L* ← β*L* + (1 − β) *GG*^{T}",
            "*R* ← β*R* + (1 − β) *G*^{T}*G*",
        ),
        ("purple", "bases *Q*_{L}, *Q*_{R}", "refreshed from *L*, *R*", "every *f* updates"),
        (
            "green",
            "moments",
            "2. *M*′ ← β_{1}*M*′ + (1 − β_{1}) *G*′",
            "3. *V*′ ← β_{2}*V*′ + (1 − β_{2}) *G*′ ⊙ *G*′",
        ),
    ),
    (
        ("blue", "update *N*", "× bias correction"),
        ("grey", "5. rotate back", "*N* = *Q*_{L} *N*′ *Q*_{R}^{T}"),
        ("green", "4. Adam's direction", "*N*′ = *M*′ / (√*V*′ + ε)"),
    ),
)


def refresh() -> Canvas:
    """The first calls of a block, and its refreshes."""
    canvas = Canvas(
        750,
        470,
        "The first calls of a block, and its refreshes",
        "Thirteen calls, with a refresh due after three updates. The first call fills the factors "
        "and updates nothing. The second computes the first basis. One refresh is adopted, one is "
        "skipped and one is rejected. A rejected gradient changes nothing.",
    )
    labels = ("gradient", "refresh of the bases", "update", "gradient to factors")
    for number, label in enumerate((*labels, "`age` after the call")):
        canvas.text(20, 70 + 40 * number, label, "label", 14, "start")
    canvas.text(20, 34, "call", "muted", 14, "start")
    for call, age in enumerate(AGES):
        _draw_call(canvas, call, age)

    canvas.line((20, 256), (730, 256), style="plain thin")
    for number, (call, note) in enumerate(NOTES_OF_CALLS.items()):
        canvas.text(92, 284 + 27 * number, f"call {call}", "label bold", 14, "end")
        canvas.text(106, 284 + 27 * number, note, "label", 14, "start")
    within = "Within a call, time runs downwards: refresh, then update, then factors."
    canvas.text(20, 452, within, "muted", 14, "start")
    return canvas


AGES = (0, 1, 2, 3, 1, 2, 2, 3, 1, 2, 3, 1, 2)
REFRESHES = {
    1: ("purple", "first"),
    4: ("purple", "new"),
    8: ("grey dashed", "skip"),
    11: ("red", "reject"),
}
REJECTED_GRADIENT = 6
NOTES_OF_CALLS = {
    0: "fills the factors; the update is zero",
    1: "computes the first basis, by `eigh`, and takes the first step",
    4: "three updates later: the bases are refreshed (here `precondition_frequency` = 3)",
    6: "rejects a gradient that is not finite: nothing changes, the age included",
    8: "skips the refresh: the bases are near enough (`refresh_tolerance`)",
    11: "rejects a refresh that cannot be trusted: the old bases stay until the next one",
}


def _draw_call(canvas: Canvas, call: int, age: int) -> None:
    x, width, height = 172 + 43 * call, 39, 30
    center = x + width / 2
    accepted = call != REJECTED_GRADIENT
    moved = accepted and call > 0
    canvas.text(center, 34, str(call), "muted", 14)
    canvas.rectangle(x, 50, width, height, "blue" if accepted else "red", 4)
    canvas.text(center, 70, "*G*" if accepted else "NaN", size=13)
    if call in REFRESHES:
        style, word = REFRESHES[call]
        canvas.rectangle(x - 1, 90, width + 2, height, style, 4)
        canvas.text(center, 110, word, size=12)
    canvas.rectangle(x, 130, width, height, "green" if moved else "lane", 4)
    canvas.text(center, 150, "*N*" if moved else "0", size=13)
    canvas.rectangle(x, 170, width, height, "orange" if accepted else "lane", 4)
    canvas.text(center, 190, "*L*, *R*" if accepted else "-", size=13)
    canvas.text(center, 230, str(age), size=13)
