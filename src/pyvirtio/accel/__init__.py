"""Who plays the platform: one small protocol for ioeventfds, interrupts and guest memory."""
