"""Measures of audio and of models: arrays in, numbers out. `audio` compares signals, `style` compares collections."""
