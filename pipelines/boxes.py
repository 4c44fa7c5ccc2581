"""Boxes on a canvas. No torch: forms and layouts use them too."""

Box = tuple[float, float, float, float]  # left, top, right, bottom: fractions of the canvas
