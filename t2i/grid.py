"""What a grid of tokens is, importable without torch."""

Grid = tuple[int, ...]


def check_grid(grid: Grid) -> None:
    """Raise ValueError unless the grid has one to three axes of at least one position each."""
    if not 1 <= len(grid) <= 3 or min(grid) < 1:
        raise ValueError(f"grid {grid} has to have one to three axes, each at least 1; an image is (rows, columns)")
