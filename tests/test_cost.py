"""Rooflines: which rate an operator runs at, and which product a driver's name means."""

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from fxmem.analysis.cost import CPU, CUDA, CostModel, default_cost_model, flops, model_of
from fxmem.basics.gpus import GPUS, find_gpu

MODEL = CostModel("model", flops=1e9, bandwidth=1e15, launch=0.0, tf32=1e10, half=1e11)
"""Memory is never in the way."""


def last_node(function, *args):
    graph = make_fx(function, tracing_mode="fake")(*args).graph
    return graph.output_node().all_input_nodes[0]


def product(dtype):
    return last_node(torch.mm, torch.ones(8, 16, dtype=dtype), torch.ones(16, 4, dtype=dtype))


@pytest.fixture
def switches():
    """As torch sets them: matrix products in full precision, convolutions in TF32."""
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = matmul.fp32_precision, conv.fp32_precision
    matmul.fp32_precision, conv.fp32_precision = "none", "tf32"
    yield matmul, conv
    matmul.fp32_precision, conv.fp32_precision = before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_of_16_bits_are_faster(dtype):
    assert MODEL.seconds(product(dtype)) == pytest.approx(2 * 8 * 16 * 4 / 1e11)


def test_products_of_32_bits_round_where_the_user_lets_them(switches):
    matmul, _ = switches
    node = product(torch.float32)
    assert MODEL.seconds(node) == pytest.approx(2 * 8 * 16 * 4 / 1e9)
    matmul.fp32_precision = "tf32"
    assert MODEL.seconds(node) == pytest.approx(2 * 8 * 16 * 4 / 1e10)


def test_convolutions_round_unless_told_not_to(switches):
    _, conv = switches
    node = last_node(F.conv2d, torch.ones(1, 3, 8, 8), torch.ones(5, 3, 1, 1))
    assert MODEL.seconds(node) == pytest.approx(2 * 5 * 3 * 64 / 1e10)
    conv.fp32_precision = "ieee"
    assert MODEL.seconds(node) == pytest.approx(2 * 5 * 3 * 64 / 1e9)


@pytest.mark.usefixtures("switches")
def test_elementwise_operators_and_plain_models_know_one_rate():
    half = torch.ones(100, dtype=torch.float16)
    assert MODEL.seconds(last_node(torch.sin, half)) == pytest.approx(100 / 1e9)
    plain = CostModel("plain", flops=1e9, bandwidth=1e15, launch=0.0)
    assert plain.seconds(product(torch.float16)) == pytest.approx(2 * 8 * 16 * 4 / 1e9)


def test_attention_costs_its_products_on_the_cpu_too():
    q = torch.ones(2, 3, 8, 4, requires_grad=True)

    def step(q):
        out = F.scaled_dot_product_attention(q, q, q)
        return torch.autograd.grad(out.sum(), q)[0]

    nodes = make_fx(step)(q).graph.nodes
    forward, backward = (n for n in nodes if "flash_attention_for_cpu" in str(n.target))
    product = 2 * (2 * 3 * 8 * 8 * 4)
    assert flops(forward) == 2 * product
    assert flops(backward) == 5 * product  # the forward's first one again, and two for each factor


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("Tesla V100-SXM2-32GB", "V100 32GB"),
        ("Tesla T4", "T4"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA GeForce RTX 2080 Ti", "RTX 2080 Ti"),
        ("NVIDIA GeForce RTX 2080", "RTX 2080"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA GeForce RTX 2080 SUPER", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("A GPU of tomorrow", None),
    ],
)
def test_names_that_drivers_report(reported, name):
    gpu = find_gpu(reported)
    assert (gpu.name if gpu else None) == name


def test_the_table_is_plausible():
    names = [gpu.name for gpu in GPUS]
    assert len(set(names)) == len(names)
    for gpu in GPUS:
        assert gpu.fp32 <= gpu.tf32 <= gpu.half or gpu.half == gpu.fp32
        assert 1e12 < gpu.fp32 < 1e15
        assert 1e11 < gpu.bandwidth < 1e13
        assert 8 * 2**30 <= gpu.nbytes < 2**38
        assert gpu.source


def test_the_device_at_hand_chooses_the_model(monkeypatch):
    assert default_cost_model(torch.device("cpu")) is CPU
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    model = default_cost_model(torch.device("cuda"))
    assert model == model_of(find_gpu("Tesla T4"))
    assert model.half / model.flops == pytest.approx(65 / 8.1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "unheard of")
    assert default_cost_model(torch.device("cuda")) is CUDA


def test_without_a_driver_there_is_a_model(monkeypatch):
    def fail(device):
        raise RuntimeError("no driver")

    monkeypatch.setattr(torch.cuda, "get_device_name", fail)
    assert default_cost_model(torch.device("cuda")) is CUDA
