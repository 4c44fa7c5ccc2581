"""Several concepts in one picture: layouts, the methods that compose them, and the mathematics they share."""
