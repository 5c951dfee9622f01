"""Count what streaming does: what was asked for, read, guessed, and waited for."""

from dataclasses import dataclass, fields


@dataclass
class Counters:
    """Counts since the model was opened, or since `reset`."""

    asked: int = 0  # experts
    missed: int = 0  # of these, had to be read when they were asked for
    guessed: int = 0  # experts, for a layer whose choice has become known
    guessed_right: int = 0
    expert_bytes: int = 0  # read, wrong guesses included
    dense_bytes: int = 0  # read of what every token uses
    stalled: float = 0.0  # seconds that computing waited for reads

    @property
    def bytes_read(self) -> int:
        """Bytes that were read in all."""
        return self.expert_bytes + self.dense_bytes

    @property
    def hit_rate(self) -> float | None:
        """The share of experts that were there when asked for; None if none was."""
        return 1 - self.missed / self.asked if self.asked else None

    @property
    def guess_rate(self) -> float | None:
        """The share of guesses that were right; None if there were none."""
        return self.guessed_right / self.guessed if self.guessed else None

    def reset(self, to: "Counters | None" = None) -> None:
        """Go back to zero, or to a copy that was taken earlier."""
        to = to or Counters()
        for f in fields(self):
            setattr(self, f.name, getattr(to, f.name))
