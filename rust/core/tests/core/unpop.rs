//! Chains that a handler takes and gives back unused.

use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::sync::Arc;

use pyvirtio_core::VirtQueue;

use crate::driver::{Driver, BUFFERS, SIZE, WRITE};
use crate::packed_driver::PackedDriver;

/// Takes three chains and gives two back; then, if there is a third, completes one.
fn try_three(vq: &Arc<VirtQueue>) {
    let taken: Vec<_> = std::iter::from_fn(|| vq.pop()).take(3).collect();
    for chain in taken.into_iter().rev() {
        vq.unpop(chain);
    }
    if let Some(mut chain) = vq.pop() {
        chain.complete().unwrap();
    }
}

#[test]
fn chains_that_were_given_back_come_again_in_order() {
    let mut driver = Driver::new();
    driver.start(try_three);
    for head in [3, 1, 4, 0] {
        driver.add(head);
    }
    driver.vq.service();
    assert_eq!(driver.used(), [(3, 0), (1, 0), (4, 0), (0, 0)]);
    assert_eq!((driver.vq.in_flight(), driver.vq.counters.chains.get()), (0, 4));
    assert_eq!(driver.vq.stop(), (4, 4));
}

#[test]
fn a_packed_ring_goes_back_over_whole_chains_and_its_end() {
    for in_order in [false, true] {
        let mut driver = PackedDriver::with(|config| config.in_order = in_order);
        driver.start(try_three);
        for round in 0..10 {
            let ids = [round % SIZE, (round + 1) % SIZE, (round + 2) % SIZE];
            for id in ids {
                driver.chain(&[(BUFFERS, 1, 0), (BUFFERS + 16, 1, WRITE)], id);
            }
            driver.vq.service();
            let used = driver.used();
            assert_eq!(used.last(), Some(&(ids[2], 0)));
            assert_eq!(driver.state.broken(), None);
            assert_eq!(driver.vq.in_flight(), 0);
            driver.seen = driver.next; // in order the last used descriptor may stand for all
        }
    }
}

#[test]
fn a_stop_goes_on_with_the_chain_that_was_given_back() {
    let mut driver = Driver::new();
    driver.start(|vq| {
        if let Some(chain) = vq.pop() {
            vq.unpop(chain);
        }
    });
    driver.add(5);
    driver.vq.service();
    assert_eq!(driver.used(), []);
    assert_eq!(driver.vq.stop(), (0, 0));
    assert_eq!(driver.state.broken(), None);
}

#[test]
fn a_handler_that_only_gives_back_ends_the_service_but_for_its_budget() {
    let calls = Arc::new(AtomicU32::new(0));
    let counted = calls.clone();
    let mut driver = Driver::new();
    driver.start(move |vq| {
        counted.fetch_add(1, SeqCst);
        for _ in 0..100 {
            let Some(chain) = vq.pop() else { return };
            vq.unpop(chain);
        }
    });
    driver.add(0);
    assert!(!driver.vq.service());
    assert_eq!(calls.load(SeqCst), 1);
}

#[test]
fn a_stale_chain_is_only_dropped() {
    let mut driver = Driver::new();
    driver.add(0);
    let chain = driver.pop().unwrap();
    driver.vq.stop();
    driver.vq.unpop(chain);
    assert_eq!(driver.state.broken(), None);
    driver.config.next_avail = 1;
    driver.start_completing();
    driver.vq.service();
    assert_eq!(driver.vq.stop(), (1, 0));
}
