"""Shards to checkpoint: plan, data, loss, Lightning module, strategies, and the codec's own trainer."""
