"""`fastpeft quantize`, `merge` and `generate` on folders: values, exit codes, no half folders."""

from __future__ import annotations

import json
from pathlib import Path

import fastpeft
import pytest
import tiny
import torch
import transformers
from fastpeft.cli import main
from fastpeft.hf import load_model
from fastpeft.patterns import is_quantized
from hf_models import bert, t5
from tiny import one_thread  # noqa: F401
from tiny_lm import TEXT, save_tiny

transformers.logging.disable_progress_bar()


@pytest.fixture
def run(capsys):
    """run("quantize", ...) -> (exit code, stdout, lines of stderr), in this process."""

    def call(*arguments: object) -> tuple[int, str, list[str]]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(word) for word in arguments])
        out, err = capsys.readouterr()
        return caught.value.code or 0, out, err.splitlines()

    return call


@pytest.fixture
def ask(run):
    """The JSON answer of a command that must succeed."""

    def call(*arguments: object) -> dict:
        code, out, err = run(*arguments, "--device", "cpu", "--json")
        assert code == 0, err
        return json.loads(out)

    return call


def fails(result, code: int, *words: str) -> None:
    got, _, lines = result
    assert got == code, lines
    errors = [line for line in lines if line.startswith(("error: ", "fix: "))]
    assert len(errors) == 2 and errors[0].startswith("error: ") and len(errors[1]) > len("fix: ")
    for word in words:
        assert word in "\n".join(errors), errors


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny Llama with its tokenizer, and text.txt beside it."""
    root = tmp_path_factory.mktemp("quantize")
    save_tiny(root / "model")
    (root / "text.txt").write_text(TEXT * 8)
    return root / "model"


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny.tokens()).logits


def adapter_of(folder: Path, target: Path, format: str | None = None, config=None):
    """A trained-looking adapter of the model in `folder`, quantised as `format`; the model too."""
    model = load_model(folder)
    if format:
        fastpeft.quantize(model, format)
    config = config or fastpeft.LoRA(r=4, target_modules="all-linear")
    fastpeft.attach(model, config)
    tiny.shake((p for p in model.parameters() if p.requires_grad), std=0.05)
    fastpeft.save_adapter(model, target)
    return model.eval()


# ---- quantize


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ((), {}),
        (("--blocksize", 32, "--no-double-quant"), {"blocksize": 32, "double_quant": False}),
        (("--format", "int8", "--threshold", 4.5), {"threshold": 4.5}),
        (("--format", "int8", "--weight-only"), {"threshold": None}),
    ],
)
def test_quantize_writes_what_the_library_makes(flags, options, base, ask, tmp_path):
    format = "int8" if "threshold" in options else "nf4"
    result = ask("quantize", base, tmp_path / "out", *flags)
    model = load_model(base)
    dense = {n: m.weight.detach() for n, m in model.named_modules() if hasattr(m, "weight")}
    report = fastpeft.quantize(model, format, **options)
    assert list(result["errors"]) == report.converted
    for name, error in result["errors"].items():
        layer = model.get_submodule(name)
        difference = layer.dequantize() - dense[name]
        relative = float(difference.norm() / dense[name].norm())
        assert error["relative"] == pytest.approx(relative, rel=1e-5) and 0 < relative < 0.15
        assert error["largest"] == pytest.approx(float(difference.abs().max()), rel=1e-5)
        assert error["bytes_before"] == dense[name].nbytes
        assert error["bytes_after"] == layer.nbytes < dense[name].nbytes / 2
    again = load_model(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
    expressible = options.get("threshold", 0) is not None
    assert result["save_as"] == ("bitsandbytes" if expressible else "fastpeft")
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == result["save_as"]
    if options.get("threshold"):
        assert {m.threshold for m in again.modules() if is_quantized(m)} == {4.5}
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<end>"


def test_quantize_shows_a_table_and_measures_the_loss(base, run, tmp_path):
    text = base.parent / "text.txt"
    words = ("quantize", base, tmp_path / "out", "--text", text, "--seq-len", 64)
    code, out, err = run(*words, "--device", "cpu", "--save-as", "fastpeft")
    assert code == 0, err
    assert out.count("model.layers.1.mlp.down_proj") >= 1 and "relative error" in out
    assert "held-out loss before" in out and "held-out loss after" in out
    assert any(line.startswith("quantising") and "14/14" in line for line in err), err


def test_the_losses_are_the_models_own(base, ask, tmp_path):
    from fastpeft.train.blocks import tokenize
    from fastpeft.train.heldout import heldout_loss
    from fastpeft.train.sources import read

    text = str(base.parent / "text.txt")
    result = ask("quantize", base, tmp_path / "out", "--text", text, "--seq-len", 64)
    tokens = tokenize(read(text), transformers.AutoTokenizer.from_pretrained(base))
    assert result["tokens"] == tokens.numel() - 1
    for name, folder in (("loss_before", base), ("loss_after", tmp_path / "out")):
        assert result[name] == pytest.approx(heldout_loss(load_model(folder), tokens, 64)[0])
    assert result["loss_before"] != result["loss_after"]


@pytest.mark.parametrize("make", [tiny.gpt2, bert, t5], ids=["gpt2", "bert", "t5"])
def test_other_architectures(make, ask, run, tmp_path, base):
    make().save_pretrained(tmp_path / "dense")
    result = ask("quantize", tmp_path / "dense", tmp_path / "out")
    model = load_model(tmp_path / "out")
    names = [name for name, module in model.named_modules() if is_quantized(module)]
    assert names == list(result["errors"]) != []
    fastpeft.quantize(expected := load_model(tmp_path / "dense"))
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name]), name
    if make is not tiny.gpt2:
        text = ("--text", base.parent / "text.txt")
        result = run("quantize", tmp_path / "dense", tmp_path / "out2", *text, "--device", "cpu")
        fails(result, 2, "causal LM")
        assert not (tmp_path / "out2").exists()


def test_quantize_refuses(base, run, tmp_path):
    def quantize(*words: object):
        return run("quantize", *words, "--device", "cpu")

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    fails(quantize(base, tmp_path / "full"), 2, "not empty", "--overwrite")
    assert (tmp_path / "full" / "mine.txt").read_text() == "keep"
    fails(quantize(tmp_path / "nothing", tmp_path / "out"), 2, "config.json")
    fails(quantize(base, tmp_path / "out", "--format", "fp4"), 2, "fp4")
    fails(quantize(base, tmp_path / "out", "--blocksize", 48), 2, "power of two")
    fails(quantize(base, tmp_path / "out", "--dtype", "int4"), 2, "int4")
    fails(quantize(base, tmp_path / "out", "--save-as", "gguf"), 2, "gguf")
    fails(quantize(base, tmp_path / "out", "--threshold", -1.0, "--format", "int8"), 2, "threshold")
    words = ("--format", "int8", "--weight-only", "--save-as", "bitsandbytes")
    fails(quantize(base, tmp_path / "out", *words), 2, "fastpeft")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]  # nothing half written
    assert quantize(base, tmp_path / "full", "--overwrite")[0] == 0
    assert not (tmp_path / "full" / "mine.txt").exists() and load_model(tmp_path / "full")
    fails(quantize(tmp_path / "full", tmp_path / "out"), 1, "already")


def test_a_crash_while_writing_leaves_the_old_folder(base, run, tmp_path, monkeypatch):
    assert run("quantize", base, tmp_path / "out", "--device", "cpu")[0] == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}

    def full_disk(self, folder, *args, **kwargs):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr(transformers.LlamaForCausalLM, "save_pretrained", full_disk)
    words = ("quantize", base, tmp_path / "out", "--overwrite", "--blocksize", 32)
    fails(run(*words, "--device", "cpu"), 2, "No space left")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}


# ---- generate


def test_generate_on_a_quantised_folder(base, ask, run, tmp_path):
    for save_as in ("bitsandbytes", "fastpeft"):
        ask("quantize", base, tmp_path / save_as, "--save-as", save_as)
    adapter_of(base, tmp_path / "adapter", "nf4")
    words = ("-p", "the quick", "--max-new-tokens", 6, "--dtype", "float32")
    for extra in ((), ("--adapter", tmp_path / "adapter")):
        answers = [
            ask("generate", folder, *words, *extra)["text"]
            for folder in (base, tmp_path / "bitsandbytes", tmp_path / "fastpeft")
        ]
        assert len(set(answers)) == 1 and answers[0]
    wrong = run("generate", tmp_path / "fastpeft", *words, "--format", "int8", "--device", "cpu")
    fails(wrong, 2, "int8")


# ---- merge


def plain(folder: Path) -> bool:
    """A dense folder with nothing of adapters in it."""
    model = load_model(folder)
    names = set(model.state_dict())
    return not any(is_quantized(m) for m in model.modules()) and names == {
        name for name in type(model)(model.config).state_dict()
    }


@pytest.mark.parametrize("make", ["llama", "gpt2"])
def test_merging_into_a_dense_base(make, base, ask, tmp_path):
    folder = base
    if make == "gpt2":
        folder = tmp_path / "gpt2"
        tiny.gpt2().save_pretrained(folder)
    model = adapter_of(folder, tmp_path / "adapter")
    result = ask("merge", folder, tmp_path / "adapter", tmp_path / "out")
    assert result["save_as"] == "dense" and len(result["errors"]) > 7
    assert max(result["errors"].values()) == 0.0  # float32: stored as computed
    merged = load_model(tmp_path / "out")
    assert plain(tmp_path / "out")
    assert torch.allclose(logits(merged), logits(model), atol=1e-4)
    with fastpeft.disabled(model):
        assert not torch.allclose(logits(merged), logits(model), atol=1e-2)


@pytest.mark.parametrize("make", ["llama", "gpt2"])
@pytest.mark.parametrize("way", ["folder", "flag"])
def test_merging_into_a_quantised_base_is_exact(make, way, base, ask, tmp_path):
    folder = base
    if make == "gpt2":
        folder = tmp_path / "gpt2"
        tiny.gpt2().save_pretrained(folder)
    config = fastpeft.LoRA(r=4, target_modules=["q_proj"] if make == "llama" else ["c_attn"])
    model = adapter_of(folder, tmp_path / "adapter", "nf4", config)
    flags: tuple = ("--format", "nf4")
    if way == "folder":
        ask("quantize", folder, tmp_path / "base")
        folder, flags = tmp_path / "base", ()
    result = ask("merge", folder, tmp_path / "adapter", tmp_path / "out", *flags)
    assert len(result["errors"]) == 2 and max(result["errors"].values()) == 0.0
    assert plain(tmp_path / "out")
    assert torch.allclose(logits(load_model(tmp_path / "out")), logits(model), atol=1e-4)


def test_merged_weights_have_the_dtype_asked_for(base, ask, tmp_path):
    half = load_model(base, torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    adapter_of(tmp_path / "half", tmp_path / "adapter", "nf4")
    ask("quantize", tmp_path / "half", tmp_path / "base")
    worst = {}
    for dtype in ("auto", "float32"):
        words = (tmp_path / "base", tmp_path / "adapter", tmp_path / dtype, "--dtype", dtype)
        worst[dtype] = max(ask("merge", *words)["errors"].values())
        expected = {torch.bfloat16 if dtype == "auto" else torch.float32}
        assert {p.dtype for p in load_model(tmp_path / dtype).parameters()} == expected
    assert worst["float32"] == 0.0 and 1e-4 < worst["auto"] < 4e-3  # bfloat16 rounds by 2^-9


def test_merging_requantised_reports_its_error(base, ask, run, tmp_path):
    model = adapter_of(base, tmp_path / "adapter", "nf4")
    words = ("merge", base, tmp_path / "adapter")
    flags = ("--format", "nf4", "--requantize")
    result = ask(*words, tmp_path / "out", *flags)
    report = fastpeft.merge(model, requantize=True)
    assert result["errors"] == pytest.approx(report.errors) and result["save_as"] == "bitsandbytes"
    assert all(0.001 < error < 0.2 for error in result["errors"].values())
    merged = load_model(tmp_path / "out")
    assert sum(is_quantized(m) for m in merged.modules()) == 14
    assert torch.equal(logits(merged), logits(model))
    code, out, _ = run(*words, tmp_path / "out2", *flags, "--device", "cpu")
    assert code == 0 and "largest relative error" in out and "14 layers" in out


def test_merge_refuses(base, run, tmp_path):
    adapter_of(base, tmp_path / "lora")
    adapter_of(base, tmp_path / "prefix", config=fastpeft.Prefix(num_virtual_tokens=4))

    def merge(*words: object):
        return run("merge", *words, "--device", "cpu")

    out = tmp_path / "out"
    fails(merge(base, tmp_path / "prefix", out), 1, "prefix")
    fails(merge(base, tmp_path / "lora", out, "--requantize"), 1, "dense base")
    fails(merge(base, tmp_path / "nothing", out), 2, "nothing")
    fails(merge(base, tmp_path / "lora", base), 2, "not empty")
    fails(merge(base, tmp_path / "lora", out, "--format", "int3"), 2, "int3")
    assert not out.exists() and not list(tmp_path.glob(".*"))


def test_settle_needs_one_merged_adapter():
    from fastpeft.errors import StateError
    from fastpeft.merge import settle

    model = tiny.llama()
    with pytest.raises(StateError, match="no merged adapter"):
        settle(model)
    fastpeft.attach(model, fastpeft.LoRA(r=2), name="a")
    fastpeft.attach(model, fastpeft.LoRA(r=2), name="b")
    fastpeft.merge(model, "a")
    with pytest.raises(StateError, match="other adapters"):
        settle(model)
    fastpeft.unmerge(model)
    fastpeft.detach(model, "b")
    fastpeft.merge(model, "a")
    names = list(tiny.llama().state_dict())
    assert list(settle(model).state_dict()) == names and fastpeft.adapters(model) == {}
