"""Settings that contradict each other are refused before anything runs."""

from __future__ import annotations

from typing import Any

import pytest

from fedllm.config import Config
from fedllm.errors import ConfigError
from fedllm.federation.plan import check_recipe


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"strategy.name": "fedit"}, "strategy.name=fedit is defined for adapter.method=lora or hydra"),
        ({"strategy.name": "fed-sb", "adapter.method": "ffa"}, "defined for adapter.method=fed-sb"),
        ({"adapter.rank": 4, "adapter.site_ranks": "2,4"}, "needs one rank at all sites; fedit, flora"),
        (
            {"adapter.method": "lora", "strategy.name": "fedit", "strategy.server_optimizer": "fedadam"},
            "momentum on A and B apart is not well-defined",
        ),
        *(
            (
                {"adapter.method": method, "strategy.server_optimizer": "fedadam"},
                "momentum on A and B apart is not well-defined",
            )
            for method in ("lora", "hydra", "dora")
        ),
        ({"strategy.server_lr": 0.5}, "strategy.server_optimizer=none has no learning rate"),
        (
            {"adapter.method": "lora", "strategy.name": "hetlora", "strategy.weighting": "examples"},
            "strategy.weighting=examples: strategy.name=hetlora weighs sites by the norm of their update",
        ),
        *(
            (
                {"adapter.method": method, "wire.codec_down": "topk:0.5+int8"},
                f"wire.codec_down=topk:0.5+int8: a zero of adapter.method={method} is not 'no change",
            )
            for method in ("ia3", "prompt")
        ),
        (
            {"adapter.method": "lora", "strategy.name": "flora", "wire.codec": "topk:0.1"},
            "factors with holes",
        ),
        (
            {"adapter.method": "lora", "strategy.name": "flexlora", "wire.codec_down": "topk:0.1"},
            "wire.codec_down=topk:0.1: strategy.name=flexlora multiplies the matrices that travel",
        ),
        (
            {"adapter.method": "lora", "strategy.name": "fedask", "wire.codec_down": "int8"},
            "wire.codec_down=int8: strategy.name=fedask sends sketches",
        ),
        ({"adapter.method": "lora", "strategy.name": "flora", "train.fedhyper": "cosine"}, "train.fedhyper"),
        (
            {"adapter.method": "ia3", "privacy.enabled": True, "privacy.epsilon": 1},
            "no per-example gradients",
        ),
        ({"wire.codec": "int7"}, "wire.codec: unknown codec 'int7'"),
        ({"wire.codec_down": "topk:2"}, "wire.codec_down: "),
    ],
)
def test_combinations_that_cannot_hold_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_recipe(Config.from_flat(values))
    assert message in str(caught.value)
