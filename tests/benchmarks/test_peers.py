"""`exfm bench peers`: its own peers begin where exfm begins and learn the same loss; what is missing is refused."""

import pytest
import torch

from benchmarks import peers
from benchmarks._peers_data import BATCH, auc, batches_of, criteo, held, job_of
from benchmarks._peers_torch import KINDS, Trainer
from benchmarks._peers_torchrec import TorchRec
from exfm.data.errors import UserError
from exfm.trainer.env import RankEnv, process_group
from exfm.trainer.loop import Job
from exfm.trainer.steps import Feed

EXAMPLES, ROWS = 300, 2000


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return job_of(criteo(tmp_path_factory.mktemp("peers"), EXAMPLES, ROWS))


@pytest.fixture(scope="module")
def first_loss_and_logits(config):
    """Of exfm's job, before its first update."""
    with process_group(RankEnv(), torch.device("cpu"), 60):
        job = Job(config, RankEnv(), torch.device("cpu"), lambda: False)
        try:
            batch = next(iter(job.open(0).batches()))
            loss, output = job.built.model(batch)
            return float(loss), output.logits[:, 0]
        finally:
            job.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_peer_begins_with_exfms_weights_and_has_its_first_loss(config, first_loss_and_logits, kind):
    trainer, (batch,) = Trainer(config, kind), held(config, 0)
    loss, logits = first_loss_and_logits
    torch.testing.assert_close(trainer.score(batch), logits, rtol=0, atol=1e-6)
    assert float(trainer.loss(batch).detach()) == pytest.approx(loss, abs=1e-6)


def test_torchrec_begins_with_exfms_weights_and_its_first_two_losses_are_exfms(config, tmp_path):
    """So the tables' and the dense part's updates are the same too."""
    both = job_of(criteo(tmp_path, 2 * EXAMPLES, ROWS, batch=EXAMPLES))
    device, losses = torch.device("cpu"), []
    with process_group(RankEnv(), device, 60):
        job = Job(both, RankEnv(), device, lambda: False)
        try:
            losses += [float(output.loss) for _, output in job.pipeline.run(Feed(job.open(0).batches()))]
        finally:
            job.close()
        found = [float(loss) for _, loss in TorchRec(both, device).train(list(batches_of(both, 0)))]
    assert found == pytest.approx(losses, abs=2e-6) and len(found) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_peer_learns_what_it_is_shown_again(config, kind):
    trainer, (batch,) = Trainer(config, kind), held(config, 0)
    before, after = trainer.step(batch), trainer.step(batch)
    assert after < before


def test_adagrad_in_one_table_learns_what_it_learns_in_26(config):
    (batch,) = held(config, 0)
    apart, together = Trainer(config, "adagrad"), Trainer(config, "joined")
    for _ in range(2):
        apart.step(batch)
        together.step(batch)
    torch.testing.assert_close(together.score(batch), apart.score(batch), rtol=0, atol=1e-5)


def test_the_area_under_the_curve_is_the_share_of_pairs_in_order():
    scores, labels = torch.tensor([0.1, 0.4, 0.4, 0.8, 0.2]), torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0])
    pairs = [(p, n) for p in scores[labels == 1] for n in scores[labels == 0]]
    by_hand = sum(1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs) / len(pairs)
    assert auc(scores.numpy(), labels.numpy()) == pytest.approx(by_hand)


def test_tables_have_the_rows_asked_for(config):
    assert sum(t.rows for t in config.tables.values()) == pytest.approx(ROWS, abs=26)
    assert config.stream.global_batch == BATCH


def test_a_peer_that_is_not_installed_is_named_with_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"'fuxictr' is not installed; pip install"):
        peers.main(["--data", "frappe", "--out", str(tmp_path)], str(tmp_path))


def test_a_missing_checkout_of_fuxictr_is_named_with_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(UserError, match=r"needs --fuxictr FOLDER.*git clone"):
        peers.main(["--data", "frappe", "--fuxictr", str(tmp_path), "--out", str(tmp_path)], str(tmp_path))


@pytest.mark.parametrize("args", [["--device", "cuda"], ["--device", "cuda", "--data", "criteo", "--peers", "joined"], ["--precision", "bf16"]])  # fmt: skip
def test_peers_are_compared_only_where_all_of_them_can_do_it(args, tmp_path):
    with pytest.raises(UserError, match="exfm,torchrec|exfm and torchrec"):
        peers.main([*args, "--out", str(tmp_path)], str(tmp_path))


@pytest.mark.parametrize("args", [["--data", "avazu"], ["--peers", "dlrm"]])
def test_an_unknown_name_is_refused_with_those_that_there_are(args, tmp_path):
    with pytest.raises(UserError, match="there are"):
        peers.main([*args, "--out", str(tmp_path)], None)
