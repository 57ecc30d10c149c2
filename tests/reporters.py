"""Who is told how work goes on, in tests."""


class Silent:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps: list[float] = []

    def stage(self, text: str) -> None:
        self.notes.append(text)

    def advance(self, done: float, total: float, text: str) -> None:
        self.steps.append(done / total)

    def note(self, text: str) -> None:
        self.notes.append(text)
