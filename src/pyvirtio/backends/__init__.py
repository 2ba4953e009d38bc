"""What a device does its work on: disks for `blk`, networks for `net`."""
