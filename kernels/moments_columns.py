"""Name the columns of a row of moments, which holds the sums over an object in a block.

TOP LEFT BOTTOM RIGHT        bounding box in px of the slide, half open
AREA                         area in px
STRAIGHT DIAGONAL MIXED      outline pixels by their share of the perimeter: 1, sqrt(2), (1 + sqrt(2)) / 2 px
SUM_Y SUM_X                  sums of the pixels' coordinates in px from the box's corner (TOP, LEFT)
SUM_YY SUM_YX SUM_XX         sums of the products of these coordinates
PROBABILITY                  sum of probabilities, 0 ... 255 each
CHANNELS + PER_CHANNEL * c   LOW, HIGH, SUM and SQUARES of channel c; NaN if any of its pixels is NaN
"""

(
    TOP,
    LEFT,
    BOTTOM,
    RIGHT,
    AREA,
    STRAIGHT,
    DIAGONAL,
    MIXED,
    SUM_Y,
    SUM_X,
    SUM_YY,
    SUM_YX,
    SUM_XX,
    PROBABILITY,
    CHANNELS,
) = range(15)
LOW, HIGH, SUM, SQUARES, PER_CHANNEL = range(5)
