"""A few models of timm and torchvision; model_families.py tries all families."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from support.ranks import together, up_to_two

pytestmark = [pytest.mark.full, up_to_two]


# These have batch norms with an activation, without one, both, 1-d ones, and four kinds of it.
@pytest.mark.parametrize(
    "model", ["test_efficientnet", "test_resnet", "ghostnet_050", "efficientvit_m0", "torchvision/mnasnet0_5"]
)
def test_a_model_trains_as_one_process_with_the_whole_batch(model):
    if find_spec("timm") is None:
        pytest.skip("timm is not installed: pip install -e '.[integrations]'")
    from model_families import compare

    found = compare(model)
    with together():
        assert found.layers > 10
        assert found.distance < 1e-10
        assert found.restored


@pytest.mark.parametrize(
    ("model", "fused"), [("torchvision/mobilenet_v3_small", 23), ("torchvision/efficientnet_b0", 33)]
)
def test_activations_are_fused(model, fused):
    """Activations are fused in torchvision's blocks, which derive from nn.Sequential."""
    if find_spec("timm") is None:
        pytest.skip("timm is not installed: pip install -e '.[integrations]'")
    from model_families import compare

    found = compare(model, fuse_activation=True)
    with together():
        assert found.fused == fused
        assert found.distance < 1e-10
        assert found.restored
