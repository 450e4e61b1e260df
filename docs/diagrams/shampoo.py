"""Diagram of Shampoo beside SOAP: two routes from a gradient to the same update."""
# ruff: noqa: RUF001  (formulas have signs such as a times and a prime)

from canvas import Canvas


def routes() -> Canvas:
    """Shampoo's route and factored SOAP's route from a gradient to an update."""
    canvas = Canvas(
        750,
        400,
        "Two routes from a gradient to the same update",
        "Above, Shampoo multiplies the gradient by the inverse roots of its factors. Below, SOAP "
        "rotates it into the eigenbasis, divides by the root of the factored second moment, and "
        "rotates back. With exponent one half and the scale of the trace both updates are equal.",
    )
    canvas.text(20, 30, "Shampoo: one product with each inverse root", "muted", 14, "start")
    canvas.text(92, 250, "SOAP with `factored`: Adafactor in the eigenbasis", "muted", 14, "start")
    canvas.box(20, 138, 110, 70, "blue", ["gradient", "*G*"])
    canvas.box(620, 138, 110, 70, "blue", ["update", "*N*"])
    shampoo = ("multiply", "*L*^{−1/2} *G* *R*^{−1/2}"), ("scale", "× trace(*L*)^{1/2}")
    for (x, width), lines in zip(((170, 230), (430, 150)), shampoo, strict=True):
        canvas.box(x, 48, width, 70, "orange", lines)
    soap = (
        ("rotate", "*G*′ = *Q*_{L}^{T} *G* *Q*_{R}"),
        ("divide", "*N*′ = *G*′ / √*V*′"),
        ("rotate back", "*N* = *Q*_{L} *N*′ *Q*_{R}^{T}"),
    )
    for x, lines in zip((150, 306, 462), soap, strict=True):
        canvas.box(x, 266, 138, 70, "green", lines)
    canvas.arrow((75, 138), (75, 83), (170, 83))
    canvas.arrow((400, 83), (430, 83))
    canvas.arrow((580, 83), (675, 83), (675, 138))
    canvas.arrow((75, 208), (75, 301), (150, 301))
    for x in (288, 444):
        canvas.arrow((x, 301), (x + 18, 301))
    canvas.arrow((600, 301), (675, 301), (675, 208))
    for x, line in (
        (255, "*L* = *Q*_{L} diag(*a*) *Q*_{L}^{T}"),
        (495, "*R* = *Q*_{R} diag(*c*) *Q*_{R}^{T}"),
    ):
        canvas.text(x, 166, line, size=14)
    canvas.text(375, 194, "*a* and *c* are the row and column sums of E[*G*′ ⊙ *G*′]", size=14)
    marginals = (
        "*V*′ = *a* *c*^{T} / trace(*L*): a second moment from its marginals, as in Adafactor"
    )
    canvas.text(375, 372, marginals, size=14)
    return canvas
