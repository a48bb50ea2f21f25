"""Parameters on their way to the engines."""
