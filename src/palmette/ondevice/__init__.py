"""Adapt: train a network on the device, within a budget of bytes."""
