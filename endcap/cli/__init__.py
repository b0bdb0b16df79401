"""The composition room: commands and the demo. It may import every other room; none may import it."""
