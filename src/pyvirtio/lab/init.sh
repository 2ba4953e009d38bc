#!/bin/busybox sh
# The init of the lab's machine: mounts the host's root file system, runs the command in it, says how it ended.
# /etc/settings has: writable=0|1  keep='DIRECTORY...'  end_mark=TEXT

/bin/busybox mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
. /etc/settings

fail() {
    echo "lab: $*" >/dev/console
    poweroff -f
}

while read -r module; do
    insmod "/modules/$module" || fail "insmod $module failed"
done </modules/order

# The host's files: as they are, or below a layer in memory that takes all changes.
mkdir /host /layer
mount -t virtiofs host /mnt || fail "the host's files could not be mounted"
if [ "$writable" = 1 ]; then
    mount --bind /mnt /host
else
    mount -t tmpfs -o size=75% layer /layer
    mkdir /layer/upper /layer/work
    mount -t overlay -o lowerdir=/mnt,upperdir=/layer/upper,workdir=/layer/work overlay /host ||
        fail "the overlay could not be mounted"
fi
eval "set -- $keep"
for directory; do
    mount --bind "/mnt$directory" "/host$directory" || fail "$directory could not be shared for writing"
done

mount --bind /proc /host/proc
mount --bind /sys /host/sys
mount -t debugfs debugfs /host/sys/kernel/debug || echo "lab: no debugfs" # figures of KVM
mount --rbind /dev /host/dev
mkdir -p /dev/pts /dev/shm /dev/net
mount -t devpts -o ptmxmode=666 devpts /host/dev/pts
mount -t tmpfs shm /host/dev/shm
[ "$writable" = 1 ] || mount -t tmpfs run /host/run
# The memory of guests, which is shared, in huge pages: an emulated fault for each small one is half of a guest's boot.
echo always >/sys/kernel/mm/transparent_hugepage/shmem_enabled || echo "lab: no huge pages"
[ -e /dev/net/tun ] || mknod /dev/net/tun c 10 200
ip link set lo up

until [ -c /dev/vport*p1 ]; do usleep 10000; done
output=$(echo /dev/vport*p1)

# A pipe between the command and the port: a command that sets O_NONBLOCK on its output would lose data otherwise.
# The end mark travels behind the output, in the same stream, so that it cannot overtake any of it.
{
    # The host's files become the root of a mount namespace: below a mere chroot, there are no user namespaces.
    unshare -m sh -c 'cd /host && mount --move . / && exec chroot . /bin/sh -c "$1"' sh "$(cat /etc/command)" \
        </dev/null 2>&1
    echo $? >/tmp/status
} | cat >"$output"
[ "$writable" = 1 ] && sync
printf '\0%s %s\n' "$end_mark" "$(cat /tmp/status)" >"$output"
sleep 60 # the host ends this machine as soon as it has read the mark
poweroff -f
