"""The tutorials run as they are and show what they say; the snippets for other libraries, where those are installed."""

import re
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

import lth_sparse as lth

HERE = Path(__file__).parents[1] / "experiments" / "tutorials"


def tutorial(name):
    return runpy.run_path(str(HERE / f"{name}.py"))


def snippet(heading):
    """The first Python block under a heading of the tutorials' README, up to the class that it defines."""
    text = (HERE / "README.md").read_text(encoding="utf-8").partition(f"## {heading}\n")[2]
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    return code.partition("\n\n\nlth.sparsify_")[0]


def test_every_tutorial_is_listed_and_tested():
    names = {path.name for path in HERE.glob("*.py")}
    listed = set(re.findall(r"\]\((\w+\.py)\)", (HERE / "README.md").read_text(encoding="utf-8")))
    tested = {f"{name}.py" for name in re.findall(r'tutorial\("(\w+)"\)', Path(__file__).read_text(encoding="utf-8"))}
    assert names == listed == tested and len(names) == 4


def test_pruning_a_torchvision_model(tmp_path, capsys):
    left = tutorial("prune_a_torchvision_model")["main"](steps=2, path=tmp_path / "ticket.safetensors")
    assert 0.2 < left < 0.3  # a quarter of what is masked, and biases, normalisation and the output layer
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "density  loss" and [line.split()[0] for line in lines[1:4]] == ["100.0%", "50.0%", "25.0%"]
    stored, dense = map(float, re.findall(r"([\d.]+) MB", lines[4]))
    assert stored < 0.35 * dense and (tmp_path / "ticket.safetensors").exists()


def test_finding_a_ticket_of_your_own_model(capsys):
    rows = tutorial("find_a_ticket_of_your_own_model")["main"](rounds=2, steps=150)
    assert [density for density, *_ in rows] == pytest.approx([1, 0.6, 0.36], abs=1e-3)
    assert all(accuracy > 0.5 for _, *accuracies in rows for accuracy in accuracies)  # a third by chance
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_benchmarking_a_layer(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("LTH_CACHE", str(tmp_path))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    found = tutorial("benchmark_your_layer")["main"](["64x48"], batch=8, rounds=6)
    assert len(found) == 4 and all(0 < gain.low <= gain.median <= gain.high and gain.n == 6 for gain in found)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["layer", *["64x48"] * 4]


class Writer:
    def __init__(self):
        self.written, self.closed = [], False

    def add_scalar(self, name, value, step):
        self.written.append((step, name, value))

    def close(self):
        self.closed = True


def test_logging_every_round(capsys):
    writer = Writer()
    found = tutorial("log_to_tensorboard")["main"](rounds=2, writer=writer)
    assert [(step, name) for step, name, _ in writer.written] == [(r, n) for r in range(3) for n in ("density", "loss")]
    assert [v for _, name, v in writer.written if name == "density"] == [round.density for round in found]
    assert writer.closed and "3 rounds" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_logging_to_tensorboard_itself(tmp_path):
    pytest.importorskip("tensorboard")
    tutorial("log_to_tensorboard")["main"](str(tmp_path), rounds=1)
    assert list(tmp_path.glob("events.out*"))


@pytest.mark.filterwarnings("ignore")
def test_the_lightning_callback_prunes_each_epoch(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(10, 10)

        def training_step(self, batch):
            return self.layer(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters())

    scope = {}
    exec(snippet("Lightning"), scope)
    module = lth.sparsify_(Module())
    data = torch.utils.data.DataLoader(torch.randn(8, 10), batch_size=4)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    lightning.Trainer(max_epochs=3, callbacks=[scope["Prune"](0.5)], default_root_dir=tmp_path, **quiet).fit(
        module, data
    )
    assert lth.density(module) in (0.12, 0.13) and int(module.layer.weight.count_nonzero()) <= 13


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_callback_prunes_while_it_trains(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    scope = {}
    exec(snippet("Hugging Face Trainer"), scope)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=20, num_labels=2, **sizes)
    model = lth.sparsify_(transformers.BertForSequenceClassification(config), exclude=["classifier"])
    rows = [{"input_ids": torch.randint(20, (5,)), "labels": i % 2} for i in range(16)]
    options = {"max_steps": 6, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": []}
    arguments = transformers.TrainingArguments(str(tmp_path), save_strategy="no", disable_tqdm=True, **options)
    transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[scope["Prune"](0.5, every=2)]).train()
    assert lth.density(model) == pytest.approx(0.25, abs=0.01)
    names = [name for name, layer in model.named_modules() if hasattr(layer, "weight_mask")]
    assert names and all((m.weight[~m.weight_mask] == 0).all() for m in map(model.get_submodule, names))
