#!/bin/busybox sh
# The init of a guest that does what the host types on its serial port: one shell line after the other.

/bin/busybox mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
while read -r module; do
    insmod "/modules/$module" || echo "insmod $module failed"
done </modules/order
. /etc/functions
stty -echo

status=0
while
    echo "::done $status"
    read -r line
do
    eval "$line"
    status=$?
done
