#!/bin/sh
# The model of the notification protocol under loom, then builds that lack something and must fail it.
set -eu
cd "$(dirname "$0")"

# Build the model with the given cfgs and print the path of its executable.
build() {
    cargo rustc --quiet --locked --lib --profile test --message-format=json -- \
        --cfg loom -C opt-level=2 -C debug-assertions=off "$@" |
        sed -n 's/.*"executable":"\([^"]*\)".*/\1/p'
}

# Without the thing named by the cfg $1, some test matching $2 must fail for each of the rings $3.
must_fail() {
    model=$(build --cfg "$1")
    for ring in $3; do
        if output=$(RING=$ring "$model" "$2" 2>&1); then
            echo "$output"
            echo "$1: the model of the $ring ring did not notice"
            exit 1
        fi
        case $output in
        *"test result: FAILED"*) echo "$1: the model of the $ring ring fails, as it must" ;;
        *) echo "$output" && exit 1 ;;
        esac
    done
}

"$(build)" model::
must_fail lose_fence no_interrupt_is_lost "split packed"
must_fail lose_fence no_kick_is_lost_between_drain_and_rearm "split packed"
must_fail publish_first a_batch_is_seen_whole packed
must_fail lose_last_look no_kick_is_lost_between_drain_and_rearm "split packed"
must_fail lose_last_read no_kick_is_lost_when_the_eventfd_is_detached "split packed"
