"""Meta-World's task names and the named streams. Imports no simulator, so that it also works on a login node."""

from __future__ import annotations

#: Sizes for all tasks.
OBSERVATION_SIZE = 39
ACTION_SIZE = 4
#: Policies act in [-1, 1].
ACTION_CLIP = 1.0
#: Meta-World refuses a 501st step.
MAX_EPISODE_STEPS = 500
#: Meta-World's reward functions; independent of the -v3 suffix of its tasks.
REWARD_VERSION = "v2"
#: Goals per goal set: a set has a thousand seeds, of fifty goals each.
MAX_GOALS = 50_000

#: All fifty Meta-World v3 tasks in alphabetical order, which is also the `mt50` stream's order.
#: A test compares it with the installed metaworld.
ALL_TASKS: tuple[str, ...] = (
    "assembly-v3",
    "basketball-v3",
    "bin-picking-v3",
    "box-close-v3",
    "button-press-topdown-v3",
    "button-press-topdown-wall-v3",
    "button-press-v3",
    "button-press-wall-v3",
    "coffee-button-v3",
    "coffee-pull-v3",
    "coffee-push-v3",
    "dial-turn-v3",
    "disassemble-v3",
    "door-close-v3",
    "door-lock-v3",
    "door-open-v3",
    "door-unlock-v3",
    "drawer-close-v3",
    "drawer-open-v3",
    "faucet-close-v3",
    "faucet-open-v3",
    "hammer-v3",
    "hand-insert-v3",
    "handle-press-side-v3",
    "handle-press-v3",
    "handle-pull-side-v3",
    "handle-pull-v3",
    "lever-pull-v3",
    "peg-insert-side-v3",
    "peg-unplug-side-v3",
    "pick-out-of-hole-v3",
    "pick-place-v3",
    "pick-place-wall-v3",
    "plate-slide-back-side-v3",
    "plate-slide-back-v3",
    "plate-slide-side-v3",
    "plate-slide-v3",
    "push-back-v3",
    "push-v3",
    "push-wall-v3",
    "reach-v3",
    "reach-wall-v3",
    "shelf-place-v3",
    "soccer-v3",
    "stick-pull-v3",
    "stick-push-v3",
    "sweep-into-v3",
    "sweep-v3",
    "window-close-v3",
    "window-open-v3",
)

#: Named streams: a stage per entry, in order. `cw10` is Continual World's order (Wolczyk et al. 2021).
STREAMS: dict[str, tuple[str, ...]] = {
    "demo": ("drawer-close-v3", "handle-press-side-v3", "window-close-v3"),
    "cw10": (
        "hammer-v3",
        "push-wall-v3",
        "faucet-close-v3",
        "push-back-v3",
        "stick-pull-v3",
        "handle-press-side-v3",
        "push-v3",
        "shelf-place-v3",
        "window-close-v3",
        "peg-unplug-side-v3",
    ),
    "mt10": (
        "reach-v3",
        "push-v3",
        "pick-place-v3",
        "door-open-v3",
        "drawer-open-v3",
        "drawer-close-v3",
        "button-press-topdown-v3",
        "peg-insert-side-v3",
        "window-open-v3",
        "window-close-v3",
    ),
    "mt50": ALL_TASKS,
}
STREAMS["cw20"] = STREAMS["cw10"] * 2
