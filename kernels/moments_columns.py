"""Columns of a row of moments: what is known of one object in one block.

TOP LEFT BOTTOM RIGHT        bounding box in the slide, half open
AREA                         pixels
STRAIGHT DIAGONAL MIXED      outline pixels by how the perimeter counts them: 1, sqrt(2), (1 + sqrt(2)) / 2
SUM_Y SUM_X                  of the pixels' coordinates from the box's corner (TOP, LEFT)
SUM_YY SUM_YX SUM_XX         of their products
PROBABILITY                  sum of 0 ... 255
CHANNELS + PER_CHANNEL * c   LOW, HIGH, SUM and SQUARES of channel c; NaN if one of its pixels is
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
