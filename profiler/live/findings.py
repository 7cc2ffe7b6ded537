"""What was found out while a live run was read: what was assumed, and what cannot be said."""

from __future__ import annotations

from dataclasses import dataclass, field

from estimator.errors import UnsupportedCombinationError


@dataclass(slots=True)
class Findings:
    """Remarks for the user, gathered part by part.

    Args:
        assumed: what no live part says and was filled in, or what makes no difference to memory.
        unknown: what the request document has no word for; each makes an estimate impossible.
    """

    assumed: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def refuse_unknown(self) -> None:
        """Refuse a run of which something cannot be said.

        Raises:
            UnsupportedCombinationError: everything that was found, in one line.
        """
        if self.unknown:
            raise UnsupportedCombinationError(
                f"the request document has no word for {'; '.join(self.unknown)}"
            )
