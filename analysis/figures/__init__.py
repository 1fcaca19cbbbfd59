"""One figure per module: `draw(data, ...)` makes it, `caption(data, ...)` says what it shows."""
