"""Quantization that searches for scales, and calibration by a text."""

import itertools
import json
import math

import pytest
import torch
from small import GQA, MODELS, TOKENIZER, in_process, random_model, relative_error, save_random

from llama import Llama
from llama.backends.quantized import Scheme, dequantize, quantize
from llama.checkpoint import Checkpoint, calibrate
from llama.checkpoint.calibrate import LEAST, WINDOW, calibrated, factor, gptq, loss, statistics, windows
from llama.cli.convert import convert, own_text

SCHEMES = [Scheme(8), Scheme(8, 32), *(Scheme(4, group, False) for group in (16, 32, 64, 128)), Scheme(4, 32)]
EACH = pytest.mark.parametrize("scheme", SCHEMES, ids=str)
WIDE = {**GQA, "dim": 128, "multiple_of": 128, "n_layers": 2}


def inputs(tokens=600, columns=128):
    """Inputs of a matrix: correlated columns of different importance."""
    return torch.randn(tokens, columns) @ torch.randn(columns, columns) * torch.rand(columns)


@EACH
@pytest.mark.parametrize("weighted", [False, True])
def test_a_search_is_never_worse_than_rounding_to_nearest(scheme, weighted):
    """In each group, by the error that it minimizes, for any distribution of weights."""
    torch.manual_seed(0)
    h = torch.rand(128) ** 8 if weighted else torch.ones(128)
    total = [0.0, 0.0]
    for weight in (torch.randn(48, 128), torch.randn(48, 128) ** 5, torch.rand(48, 128) + 3, torch.ones(48, 128)):
        errors = []
        for found in (quantize(weight, scheme), quantize(weight, scheme, h)):
            error = ((dequantize(found) - weight).square() * h).unflatten(1, (-1, scheme.group_size(128)))
            errors.append(error.sum(-1))
        assert (errors[1] <= errors[0] * (1 + 1e-5) + 1e-9).all()
        total = [old + float(new.sum()) for old, new in zip(total, errors, strict=True)]
    assert total[1] < (0.999 if scheme.bits == 8 else 0.95) * total[0]


@pytest.mark.parametrize("ends", [(0, 16), (1, 15)])
def test_a_search_finds_the_grid_of_quantized_weights(ends):
    """As in another quantized file, whether or not weights reach both ends of the grid."""
    torch.manual_seed(0)
    weight = torch.randint(*ends, (8, 64)) * 0.125 - 1
    found = quantize(weight, Scheme(4, 64, False), torch.ones(64))
    assert relative_error(dequantize(found), weight) < 1e-3


def test_a_search_of_constant_weights_or_zero_importance():
    for scheme in SCHEMES:
        for weight in (torch.zeros(4, 128), torch.ones(4, 128), torch.full((4, 128), 1e-30)):
            for h in (torch.ones(128), torch.zeros(128)):
                assert torch.allclose(dequantize(quantize(weight, scheme, h)), weight, rtol=1e-3, atol=1e-6)


@EACH
def test_gptq_is_never_worse_than_nearest_in_any_row(scheme):
    torch.manual_seed(0)
    weight, x = torch.randn(96, 128), inputs()
    found, near = gptq(weight, x.t() @ x, scheme), quantize(weight, scheme)
    assert [None if part is None else (part.shape, part.dtype) for part in found] == [
        None if part is None else (part.shape, part.dtype) for part in near
    ]
    damped, _, _ = factor(x.t() @ x)
    assert (loss(found, weight, damped) <= loss(near, weight, damped)).all()
    ours, theirs = (relative_error(x @ dequantize(q).t(), x @ weight.t()) for q in (found, near))
    assert ours < (0.95 if scheme.bits == 8 and not scheme.group else 0.8) * theirs


def test_columns_compensate_the_error_of_earlier_ones():
    """Worked out by hand: two equal inputs, so that only the sum of two weights counts. In steps of 1, from -8 to 7,
    0.4 is rounded to 0, and its error 0.4 is added to 0.3: 0.7 is rounded to 1. Rounding to nearest would give a sum of
    0."""
    weight = torch.zeros(1, 16)
    weight[0, :3] = torch.tensor([0.4, 0.3, -8.0])
    hessian = torch.eye(16)
    hessian[0, 1] = hessian[1, 0] = 0.999
    found = dequantize(gptq(weight, hessian * torch.tensor(1e4), Scheme(4, 16)))
    assert found[0, :3].tolist() == pytest.approx([0, 1, -8], abs=1e-2)
    assert dequantize(quantize(weight, Scheme(4, 16)))[0, :3].tolist() == [0, 0, -8]


def test_matrices_change_toward_the_original_outputs():
    """By ridge regression, here as least squares with one more row per column; for new inputs too."""
    torch.manual_seed(0)
    y, weight = inputs(1200), torch.randn(48, 128)
    x = y @ (torch.eye(128) + 0.02 * torch.randn(128, 128))
    hessian, change = statistics("wq", x[:600].split(200), y[:600].split(200))
    assert relative_error(hessian, x[:600].t() @ x[:600]) < 1e-5
    damping = hessian.diagonal().mean().sqrt() * torch.eye(128)
    rows, outputs = torch.cat([x[:600], damping]), torch.cat([(y - x)[:600] @ weight.t(), torch.zeros(128, 48)])
    expected = torch.linalg.lstsq(rows, outputs).solution.t()
    assert relative_error(weight @ change, expected) < 1e-3
    before, after = (relative_error(x[600:] @ w.t(), y[600:] @ weight.t()) for w in (weight, weight + expected))
    assert after < 0.7 * before
    found = [dequantize(gptq(weight, hessian, Scheme(8), each)) for each in (change, None)]
    assert relative_error(found[0], weight + expected) < 0.03
    assert relative_error(found[1], weight) < 0.03


@pytest.mark.parametrize("kind", ["dead", "none", "one", "few", "huge", "tiny"])
def test_damaged_hessians(kind):
    """Columns that the text never activates, fewer tokens than columns, and no inputs at all."""
    torch.manual_seed(0)
    x = inputs(3 if kind == "few" else 300)
    if kind == "dead":
        x[:, ::3] = 0
    elif kind in ("none", "one"):
        x[:, (kind == "one") :] = 0
    x *= {"huge": 1e12, "tiny": 1e-12}.get(kind, 1)
    weight = torch.randn(48, 128)
    for scheme in SCHEMES:
        found = dequantize(gptq(weight, x.t() @ x, scheme))
        assert found.isfinite().all()
        assert relative_error(found, weight) < 0.5
        if kind != "none":
            near = dequantize(quantize(weight, scheme))
            assert relative_error(x @ found.t(), x @ weight.t()) <= 1.01 * relative_error(x @ near.t(), x @ weight.t())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("wide")
    save_random(path, WIDE)
    return path


@pytest.fixture(scope="module")
def ids():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 1024, (LEAST + 100,), generator=generator).tolist()


def test_hessians_are_of_the_models_inputs(folder, ids, monkeypatch):
    """Without rounding, the Hessians are those of the inputs of its linear layers, and no matrix changes."""
    source = Checkpoint(folder)
    args, seen, given = source.args(1024), {}, []

    def exact(weight, hessian, scheme, change):
        given.append(hessian)
        assert not change.any()
        return weight

    monkeypatch.setattr(calibrate, "gptq", exact)
    monkeypatch.setattr(calibrate, "dequantize", lambda matrix: matrix)
    model = random_model(WIDE, 1024, max_batch_size=8, max_seq_len=WINDOW)
    order = [f"attention.{name}" for name in ("wq", "wk", "wv", "wo")] + [
        f"feed_forward.{n}" for n in ("w1", "w3", "w2")
    ]
    names = [f"layers.{i}.{name}" for i in range(2) for name in order] + ["output"]
    for name in names:
        hook = lambda module, x, name=name: seen.__setitem__(name, x[0])  # noqa: E731
        model.get_submodule(name).register_forward_pre_hook(hook)
    with torch.inference_mode():
        model(windows(ids, 1024))
    found = [name for name, _ in calibrated(source, args, Scheme(8), windows(ids, 1024))]
    assert found == [f"{name}.weight" for name in names]
    each = dict(zip(names, given, strict=True))
    for name, x in seen.items():
        assert relative_error(each[name], x.t() @ x) < 1e-4, name


def test_later_layers_are_calibrated_on_quantized_earlier_ones(folder, ids):
    """The logits for the text, and for another text, are closer than when each matrix is rounded by itself."""
    source, scheme = Checkpoint(folder), Scheme(4, 64, False)
    args = source.args(1024)
    models = {name: random_model(WIDE, 1024, max_batch_size=8, max_seq_len=WINDOW) for name in ("", "near", "ours")}
    for name, weight in models["near"].named_parameters():
        if own := scheme.of(name):
            weight.copy_(dequantize(quantize(weight, own)))
    for name, matrix in calibrated(source, args, scheme, windows(ids, 1024)):
        models["ours"].get_parameter(name).copy_(dequantize(matrix))
    other = torch.randint(3, 1024, (2, WINDOW), generator=torch.Generator().manual_seed(2))
    for tokens in (windows(ids, 1024), other):
        with torch.inference_mode():
            exact, near, ours = (model(tokens) for model in models.values())
        assert relative_error(ours, exact) < 0.97 * relative_error(near, exact)


def logits(folder):
    model = Llama.build(folder, TOKENIZER, 64, 2, device="cpu", dtype="float32").model
    with torch.inference_mode():
        return model(torch.tensor([[1, 5, 9, 2, 77, 30]]))


@pytest.mark.parametrize("kind", ["int4", "int4 --symmetric", "int8"])
def test_the_command(folder, tmp_path, monkeypatch, kind):
    """With a text, or one that the model generates; the same for any number of shards; loaded like any other
    checkpoint."""
    monkeypatch.setattr("llama.cli.convert.OWN", LEAST)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, once upon a time. " * 80)
    flags = ("--quantize", *kind.split(), "--tokenizer_path", TOKENIZER, "--calibrate")
    for mp in (1, 2):
        done = in_process(convert, folder, tmp_path / f"{mp}", "--mp", mp, *flags, text if "int4" in kind else "auto")
        assert done.returncode == 0, done.stderr
    assert torch.equal(logits(tmp_path / "1"), logits(tmp_path / "2"))
    saved = json.loads((tmp_path / "1" / "params.json").read_text())["quantization"]
    bits, symmetric = int(kind[3]), kind != "int4"
    assert saved == {"bits": bits, "group_size": {4: 32, 8: 0}[bits], "symmetric": symmetric}
    assert relative_error(logits(tmp_path / "1"), logits(folder)) < {4: 0.5, 8: 0.05}[bits]


def test_search_is_the_default_of_four_bits(folder, tmp_path):
    flags = ("--tokenizer_path", TOKENIZER, "--quantize", "int4", "--group_size", 64)
    for name, more in (("default", ()), ("search", ("--search",)), ("nosearch", ("--nosearch",))):
        assert not in_process(convert, folder, tmp_path / name, *flags, *more).returncode
    files = {path.name: torch.load(path / "consolidated.00.pth") for path in tmp_path.iterdir()}
    name = "layers.0.attention.wq"
    weight = random_model(WIDE, 1024).state_dict()[name + ".weight"]
    near, searched = quantize(weight, Scheme(4, 64, False)), quantize(weight, Scheme(4, 64, False), torch.ones(128))
    assert torch.equal(files["nosearch"][name + ".scales"], near.scale)
    assert torch.equal(files["search"][name + ".scales"], searched.scale)
    assert torch.equal(files["default"][name + ".weight"], searched.q)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--calibrate", "auto"), "calibrate needs --quantize int8 or int4"),
        (("--symmetric",), "symmetric needs --quantize"),
        (("--search",), "search needs --quantize"),
        (("--quantize", "int4", "--search", "3"), "search is 3; it must be True or False"),
        (("--quantize", "int4", "--calibrate", "nowhere.txt"), "calibrate nowhere.txt is not an existing file"),
        (("--quantize", "int4", "--calibrate", "EMPTY"), "has 1 tokens; at least 1,024 are needed"),
        (("--quantize", "int4", "--calibrate", "SHORT"), "has 26 tokens; at least 1,024 are needed"),
        (("--quantize", "int4", "--to", "hf", "--calibrate", "auto"), "Hugging Face's layout cannot hold int4"),
    ],
)
def test_errors_are_one_line_and_leave_no_files(folder, tmp_path, flags, message):
    (tmp_path / "EMPTY").touch()
    (tmp_path / "SHORT").write_text("one two three " * 6)
    flags = [str(tmp_path / flag) if flag in ("EMPTY", "SHORT") else flag for flag in flags]
    done = in_process(convert, folder, tmp_path / "to", "--tokenizer_path", TOKENIZER, *flags)
    assert done.returncode == 1
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["EMPTY", "SHORT"]


def test_quantized_weights_cannot_be_calibrated(folder, tmp_path):
    flags = ("--tokenizer_path", TOKENIZER, "--quantize", "int4")
    in_process(convert, folder, tmp_path / "q", *flags)
    done = in_process(convert, tmp_path / "q", tmp_path / "to", *flags, "--calibrate", "auto")
    assert "is quantized already, to int4 in groups of 32; calibrate with the original weights" in done.stderr
    done = in_process(convert, tmp_path / "q", tmp_path / "to", *flags, "--symmetric")
    assert "it cannot become int4 in groups of 32, symmetric" in done.stderr


def test_non_finite_inputs_are_named(tmp_path, ids):
    state = save_random(tmp_path, WIDE)
    state["layers.1.attention_norm.weight"][3] = math.nan
    torch.save(state, tmp_path / "consolidated.00.pth")
    source = Checkpoint(tmp_path)
    with pytest.raises(FloatingPointError, match=r"layers.1.attention.wq.weight inputs that are NaN or infinite"):
        for _ in calibrated(source, source.args(1024), Scheme(8), windows(ids, 1024)):
            pass


def test_ids_outside_of_the_vocabulary_are_named():
    with pytest.raises(ValueError, match="ids outside 0 to 99"):
        windows([100] * LEAST, 100)


@pytest.fixture
def llama():
    return Llama.build(MODELS / "small-chat", max_seq_len=WINDOW, max_batch_size=8, device="cpu", dtype="float32")


@pytest.mark.parametrize("chat", [False, True])
def test_a_model_generates_its_calibration_text(llama, chat):
    """Texts begin with BOS, are the same each time, and also come from a model that ends them early."""
    bos, eos = llama.tokenizer.bos_id, llama.tokenizer.eos_id
    found = own_text(llama, 300, chat)
    assert 300 <= len(found) < 600 and found[0] == bos and eos not in found
    assert found.count(bos) > 1
    assert own_text(Llama(llama.model, llama.tokenizer), 300, chat) == found
    starts = [*(i for i, id in enumerate(found) if id == bos), len(found)]
    texts = [llama.tokenizer.decode(found[i + 1 : j]) for i, j in itertools.pairwise(starts)]
    assert all(text.startswith("[INST]") and text.count("[/INST]") == 1 for text in texts) == chat


def test_a_chat_format_that_is_too_long_to_calibrate_with(llama, monkeypatch):
    encode = llama.chat_format.encode
    monkeypatch.setattr(llama.chat_format, "encode", lambda *dialog: encode(*dialog) * 100)
    with pytest.raises(ValueError, match=r"the chat format takes \d+ tokens for a question; at most 255 fit"):
        own_text(llama, 300, True)


def test_a_bundled_model_diverges_less(tmp_path, monkeypatch):
    """The Kullback-Leibler divergence from the model's own predictions on a held-out text, against rounding to
    nearest."""
    flags = ("--quantize", "int4", "--group_size", 64)
    monkeypatch.setattr("llama.cli.convert.OWN", 2 * LEAST)
    models = MODELS / "small", tmp_path / "near", tmp_path / "ours"
    assert not in_process(convert, models[0], models[1], *flags, "--nosearch").returncode
    assert not in_process(convert, models[0], models[2], *flags, "--calibrate", "auto").returncode
    text = "Once upon a time, there was a little fox named Hugo. Every morning, Hugo liked to draw pictures. " * 2
    found = []
    for folder in models:
        llama = Llama.build(folder, MODELS / "tokenizer.model", device="cpu", dtype="float32")
        with torch.inference_mode():
            found.append(llama.model(torch.tensor([llama.tokenizer.encode(text, True, False)])).log_softmax(-1)[0])
    exact, near, ours = found
    divergence = [torch.nn.functional.kl_div(q, exact, reduction="batchmean", log_target=True) for q in (near, ours)]
    assert divergence[1] < 0.8 * divergence[0]
