"""Compares ioeventfd on and off in one boot of Linux (`pyvirtio demo`)."""
