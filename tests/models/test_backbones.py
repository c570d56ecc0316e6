"""What holds of every backbone: saving, compiling, tracing, meta construction, empty and asynchronous batches."""

import pytest
import torch

from exfm.models.build import build_backbone


def batch(inputs, num_examples, device="cpu"):
    dense = torch.randn(num_examples, inputs.num_dense, device=device)
    return dense, torch.randn(num_examples, inputs.pooled_width, device=device)


def assert_identical(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_a_saved_state_gives_the_same_outputs_in_another_model(case, tmp_path):
    config, inputs = case
    saved, loaded = build_backbone(config, inputs), build_backbone(config, inputs)
    torch.save(saved.state_dict(), tmp_path / "state.pt")
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    arguments = batch(inputs, 4)
    assert_identical(loaded(*arguments), saved(*arguments))


def test_compiled_once_without_graph_breaks_it_equals_eager_for_every_batch_size(case):
    config, inputs = case
    model = build_backbone(config, inputs)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    for num_examples in (4, 7, 19):
        arguments = batch(inputs, num_examples)
        assert_identical(compiled(*arguments), model(*arguments))
    assert len(graphs) == 1


def test_traced_by_fx_as_pipelines_do_it_equals_eager(case):
    config, inputs = case
    model = build_backbone(config, inputs)
    traced = torch.fx.symbolic_trace(model)
    for num_examples in (4, 7):
        arguments = batch(inputs, num_examples)
        assert_identical(traced(*arguments), model(*arguments))


def test_no_examples_give_no_outputs_and_zero_gradients(case):
    config, inputs = case
    model = build_backbone(config, inputs)
    out = model(*batch(inputs, 0))
    assert out.shape == (0, model.out_width)
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_no_example_depends_on_another(case):
    config, inputs = case
    model = build_backbone(config, inputs).double()
    dense, pooled = (x.double() for x in batch(inputs, 5))
    torch.testing.assert_close(model(dense, pooled)[2:3], model(dense[2:3], pooled[2:3]), rtol=0, atol=1e-12)


def test_forward_and_backward_look_at_no_value(case):
    """Tensors of the meta device have none: what would wait for the device, or branch on data, raises on them."""
    config, inputs = case
    with torch.device("meta"):
        model = build_backbone(config, inputs)
    out = model(*batch(inputs, 3, device="meta"))
    out.sum().backward()
    assert out.shape == (3, model.out_width)


def test_built_on_meta_and_reset_it_is_the_model_built_directly(case):
    config, inputs = case
    torch.manual_seed(5)
    direct = build_backbone(config, inputs)
    with torch.device("meta"):
        late = build_backbone(config, inputs)
    late.to_empty(device="cpu")
    torch.manual_seed(5)
    owners = [module for module in late.modules() if list(module.parameters(recurse=False))]
    for module in owners:
        module.reset_parameters()
    late_state = late.state_dict()
    assert late_state.keys() == direct.state_dict().keys()
    assert not list(late.buffers())
    arguments = batch(inputs, 4)
    assert late(*arguments).shape == direct(*arguments).shape
    for name, value in direct.state_dict().items():
        assert_identical(late_state[name], value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_forward_and_backward_never_wait_for_the_gpu(case):
    config, inputs = case
    model = build_backbone(config, inputs).cuda()
    arguments = batch(inputs, 64, device="cuda")
    model(*arguments).sum().backward()  # the first pass may wait while libraries start
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(*arguments).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
