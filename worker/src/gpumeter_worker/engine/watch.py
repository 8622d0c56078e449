"""Whether an engine hangs: it has work and says nothing for longer than any step of this model can take, or it starts
and does nothing any more.

Pure: the clock is an argument. Owns the bound, which follows from what was measured, and how silence is counted. Does
not know how an engine is ended. Silence is what is watched, because a process that hangs in a kernel, in a lock or in
a stopped state has that in common, and an engine that is well says something after every step.
"""

SHORTEST_NS = 60 * 10**9
"""No bound is shorter: a library may compile a kernel, a node may be short of everything for a while."""

LONGEST_NS = 1800 * 10**9
_TIMES = 20
_FEW_TOKENS = 64
"""A step of fewer tokens takes as long as one of these, because it reads all weights; it says nothing about more."""

_LOOK_NS_MAX = 2 * 10**9


class StepWatch:
    """What is known about the steps of one engine, and for how long it has been silent."""

    def __init__(self, fixed_ns: int, step_tokens: int, wait_ns: int) -> None:
        """`fixed_ns` replaces the measured bound unless it is 0; `wait_ns` is how long a first step may be put off."""
        self._fixed_ns = fixed_ns
        self._step_tokens = step_tokens
        self._wait_ns = wait_ns
        self._warm_up_ns = 0
        self._whole_step_ns = 0
        self._looked_ns = 0
        self._received = 0
        self._silent_ns = 0

    @property
    def timeout_ns(self) -> int:
        """How long the engine may be silent while it has work.

        Twenty times the slowest step so far, each taken as if it had held all the tokens that a step may hold; before
        the first one the whole warm-up counts as a step of 64 tokens. Never below the warm-up's own time, because
        what was compiled then may have to be compiled again for another shape. All that within a minute and 30 minutes.
        """
        if self._fixed_ns:
            return self._fixed_ns + self._wait_ns
        step_ns = self._whole_step_ns or self._scaled(self._warm_up_ns, 0)
        return min(max(SHORTEST_NS, self._warm_up_ns, _TIMES * step_ns), LONGEST_NS) + self._wait_ns

    def warmed_up(self, took_ns: int) -> None:
        """The engine is ready."""
        self._warm_up_ns = took_ns

    def step(self, took_ns: int, tokens: int) -> None:
        """A step was reported."""
        self._whole_step_ns = max(self._whole_step_ns, self._scaled(took_ns, tokens))

    def look(self, now_ns: int, received: int, *, owes: bool) -> bool:
        """Look once more: whether the engine has been silent for too long. `owes`: it has work, and all was handled.

        What passes between two looks counts for at most two seconds: where this process itself was stopped, or its
        whole machine, the engine had no chance to say anything.
        """
        since_ns = min(now_ns - self._looked_ns, _LOOK_NS_MAX) if self._looked_ns else 0
        self._looked_ns = now_ns
        if not owes or received != self._received:
            self._received, self._silent_ns = received, 0
            return False
        self._silent_ns += since_ns
        return self._silent_ns > self.timeout_ns

    def _scaled(self, took_ns: int, tokens: int) -> int:
        return took_ns * max(self._step_tokens, tokens) // max(tokens, min(_FEW_TOKENS, self._step_tokens))


PROGRESS_PAGES = 256
"""Less than this, 1 MiB, is what a process does that only waits: a library's thread wakes up and looks around."""


class StartWatch:
    """Whether an engine that loads or warms up gets on. It says nothing meanwhile, so what it does is looked at.

    However slow a volume is, a load that gets on reads a megabyte within minutes; one that waits for a server that went
    away, for a lock or for a driver reads none and touches no memory.
    """

    def __init__(self, timeout_ns: int) -> None:
        """`timeout_ns` of 0 is for ever."""
        self._timeout_ns = timeout_ns
        self._looked_ns = 0
        self._done_pages = 0
        self._still_ns = 0

    def look(self, now_ns: int, done_pages: int | None) -> bool:
        """Look once more, as StepWatch does. `done_pages`: what it did since it began, None where nobody can tell."""
        since_ns = min(now_ns - self._looked_ns, _LOOK_NS_MAX) if self._looked_ns else 0
        self._looked_ns = now_ns
        if done_pages is None or done_pages - self._done_pages >= PROGRESS_PAGES:
            self._done_pages, self._still_ns = done_pages or 0, 0
            return False
        self._still_ns += since_ns
        return 0 < self._timeout_ns < self._still_ns
