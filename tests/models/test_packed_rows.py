"""Rows of one document with a padded tail: whatever stands in the tail, the loss is that of the document."""

import torch

DOCUMENT, LENGTH = 15, 24


def loss_of_row(gpt, tokens, pad):
    """The mean over real targets, as GPTDataset masks it: no padding and no last position."""
    labels = torch.roll(tokens, -1, dims=1)
    mask = torch.ones(tokens.shape)
    mask[labels == pad] = 0
    mask[:, -1] = 0
    positions = torch.arange(LENGTH)[None]
    losses = gpt(tokens, positions, None, labels=labels)
    return (losses * mask).sum() / mask.sum(), mask


def test_loss_does_not_move_when_padding_does(build_gpt):
    gpt, variant = build_gpt("llama2_tiny")
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, variant.vocab_size - 10, (1, LENGTH), generator=generator)
    found = []
    for pad in (3, variant.vocab_size - 1, variant.vocab_size - 2):
        row = ids.clone()
        row[:, DOCUMENT:] = pad
        loss, mask = loss_of_row(gpt, row, pad)
        assert mask.sum() == DOCUMENT - 1
        loss.backward()
        gradient = gpt.decoder.layers[0].mlp.linear_fc1.weight.grad
        found.append((loss.item(), gradient.clone()))
        gpt.zero_grad()
    assert found[0][0] == found[1][0] == found[2][0]
    assert torch.equal(found[0][1], found[1][1])
    # Divided by the length of the row instead of its real tokens the loss would move with the padding's share.
    short = ids[:, :DOCUMENT].clone()
    losses = gpt(short, torch.arange(DOCUMENT)[None], None, labels=torch.roll(short, -1, dims=1))
    torch.testing.assert_close(losses[:, :-1].mean().item(), found[0][0], rtol=1e-5, atol=0)
