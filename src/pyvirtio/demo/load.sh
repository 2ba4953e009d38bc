# The load that the demo measures, in the guest.

# Each read is to be a request of its own, not part of what an I/O scheduler has collected.
for disk in /sys/block/vd*; do
    echo none >"$disk/queue/scheduler"
done

# reader DISK BLOCK: read 4 KiB blocks from BLOCK to the end of the disk, again and again, past the page cache.
reader() {
    while [ -e /tmp/load ]; do
        dd if="$1" of=/dev/null bs=4k skip="$2" iflag=direct 2>/dev/null
    done
}

# counter: count with what the readers leave of the CPU; say how far it got on SIGUSR1, and on SIGTERM for the last
# time. An answer may come late but is right: where there is no time to answer, there is none to count either.
counter() {
    i=0
    trap 'echo "::counted $i"' USR1
    trap 'echo "::counted $i"; exit' TERM
    touch /tmp/counting
    while :; do i=$((i + 1)); done
}

# priority LEVEL PROCESS: as nice(1) has it, a smaller level goes first.
priority() {
    renice -n "$1" -p "$2" 2>/dev/null
}

mark() {
    read -r since_boot _ </proc/uptime
    echo "::$1 $since_boot"
}

# load DISK READERS SECONDS: what is between the lines ::begin and ::end is the window that counts.
load() {
    rm -f /tmp/counting
    counter &
    counter=$!
    until [ -e /tmp/counting ]; do sleep 0.01; done # a signal before its trap would end it
    priority 10 $counter
    touch /tmp/load
    reader=0
    while [ $reader -lt "$2" ]; do
        reader "$1" $((reader * 1024)) &
        reader=$((reader + 1))
    done
    priority -10 $$ # the window has to end in time
    sleep 0.2 # until all readers are at it
    kill -USR1 $counter
    mark begin
    sleep "$3"
    kill -TERM $counter
    mark end
    rm /tmp/load
    killall -q dd
    priority 0 $$
    wait
}

# prepare_to_transmit: give the only network card to the kernel's frame generator.
prepare_to_transmit() {
    for card in /sys/class/net/*; do
        card=${card##*/}
        [ "$card" = lo ] || break
    done
    ip link set "$card" up
    echo "add_device $card" >/proc/net/pktgen/kpktgend_0
    for setting in "count 0" "dst 198.51.100.1" "dst_mac 02:00:00:00:00:01"; do
        echo "$setting" >"/proc/net/pktgen/$card"
    done
}

# transmit SIZE SECONDS: send frames of SIZE bytes; what is between the lines ::begin and ::end counts.
transmit() {
    echo "pkt_size $1" >"/proc/net/pktgen/$card"
    priority -10 $$
    echo start >/proc/net/pktgen/pgctrl & # returns when it is stopped
    sleep 0.2
    mark begin
    sleep "$2"
    mark end
    echo stop >/proc/net/pktgen/pgctrl
    priority 0 $$
    wait
}
