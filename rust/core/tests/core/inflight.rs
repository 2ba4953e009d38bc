//! Requests that are in flight when the device's process ends are done again by the next one.

use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use pyvirtio_core::{GuestMemory, InflightRegion};

use crate::driver::{Driver, AVAIL, SIZE, USED};

/// Where the region of the queue is in its file; the one before it belongs to another queue.
const AT: u64 = 192;
const VERSION: u64 = AT + 8;
const ENTRIES: u64 = AT + 10;
const LAST_BATCH_HEAD: u64 = AT + 12;
const USED_IDX: u64 = AT + 14;

fn state(head: u16) -> u64 {
    AT + 16 + 16 * u64::from(head)
}

fn region() -> InflightRegion {
    InflightRegion { memory: GuestMemory::allocate(&[(0, 4096)]).unwrap(), at: AT, entries: SIZE }
}

fn tracked() -> (Driver, GuestMemory) {
    let region = region();
    let memory = region.memory.clone();
    (Driver::with(|config| config.inflight = Some(region)), memory)
}

/// The heads that a new device serves, in that order.
fn served_after_a_crash(driver: &Driver) -> Vec<u16> {
    let next = driver.with_a_new_device();
    let heads = Arc::new(Mutex::new(Vec::new()));
    let seen = heads.clone();
    next.start(move |vq| {
        while let Some(mut chain) = vq.pop() {
            seen.lock().unwrap().push(chain.head());
            chain.complete().unwrap();
        }
    });
    next.vq.service();
    let heads = heads.lock().unwrap().clone();
    heads
}

#[test]
fn what_was_taken_and_not_given_back_is_done_again_in_order_and_before_what_is_new() {
    let (mut driver, _) = tracked();
    for head in [5, 1, 4, 2] {
        driver.add(head);
    }
    let mut chains: Vec<_> = (0..4).map(|_| driver.pop().unwrap()).collect();
    chains[1].complete().unwrap();
    driver.add(7);
    assert_eq!(served_after_a_crash(&driver), [5, 4, 2, 7]);
    assert_eq!(driver.used().iter().map(|used| used.0).collect::<Vec<_>>(), [1, 5, 4, 2, 7]);
    assert!(served_after_a_crash(&driver).is_empty());
    std::mem::forget(chains);
}

#[test]
fn a_second_crash_keeps_the_order() {
    let (mut driver, _) = tracked();
    driver.add(3);
    driver.add(0);
    let first = [driver.pop(), driver.pop()];
    let mut next = driver.with_a_new_device();
    next.add(1);
    let second = [next.pop(), next.pop(), next.pop()];
    assert_eq!(served_after_a_crash(&next), [3, 0, 1]);
    std::mem::forget((first, second));
}

#[test]
fn a_batch_that_the_driver_was_told_of_is_not_done_again() {
    let (mut driver, memory) = tracked();
    for head in 0..3 {
        driver.add(head);
    }
    let mut chains: Vec<_> = (0..3).map(|_| driver.pop().unwrap()).collect();
    chains[0].complete().unwrap();
    chains[2].complete().unwrap();
    // As if killed between the used index and the notes: both are told of, and noted as in flight.
    memory.atomic16(USED_IDX).unwrap().store(0, SeqCst);
    for head in [0, 2] {
        memory.atomic64(state(head)).unwrap().fetch_or(1, SeqCst);
    }
    assert_eq!(served_after_a_crash(&driver), [1]);
    std::mem::forget(chains);
}

#[test]
fn a_batch_that_the_driver_was_not_told_of_is_done_again() {
    let (mut driver, memory) = tracked();
    driver.add(6);
    driver.add(2);
    // As if killed in front of the used index, with all before it done.
    for (head, counter) in [(6, 0), (2, 1)] {
        memory.atomic64(state(head)).unwrap().store(1 | 6 << 48, SeqCst);
        memory.atomic64(state(head) + 8).unwrap().store(counter, SeqCst);
    }
    for (at, value) in [(VERSION, 1), (ENTRIES, SIZE), (LAST_BATCH_HEAD, 2)] {
        memory.atomic16(at).unwrap().store(value, SeqCst);
    }
    assert_eq!(served_after_a_crash(&driver), [6, 2]);
}

#[test]
fn an_orderly_stop_leaves_nothing_to_do_again_and_the_ring_goes_on_where_it_was() {
    let (mut driver, _) = tracked();
    driver.start_completing();
    driver.add(4);
    driver.vq.service();
    assert_eq!(driver.vq.stop(), (1, 1));
    driver.add(0);
    assert_eq!(served_after_a_crash(&driver), [0]);
}

fn refusal(spoil: impl FnOnce(&GuestMemory, &mut Driver)) -> String {
    let (mut driver, memory) = tracked();
    driver.start_completing();
    driver.vq.stop();
    spoil(&memory, &mut driver);
    let handler = Arc::new(crate::driver::Closure(|_: &Arc<pyvirtio_core::VirtQueue>| ()));
    driver.vq.start(driver.memory.clone(), &driver.config, handler).unwrap_err().to_string()
}

#[test]
fn a_region_that_cannot_be_one_is_refused() {
    let store =
        |at, value| move |memory: &GuestMemory, _: &mut Driver| memory.atomic16(at).unwrap().store(value, SeqCst);
    assert!(refusal(store(VERSION, 2)).contains("version 2; only 1 is known"));
    assert!(refusal(store(ENTRIES, 9)).contains("it says that it has 9 entries, not 8"));
    assert!(refusal(store(USED_IDX, 100)).contains("the used index is 65436 entries ahead"));
    let far = |memory: &GuestMemory, driver: &mut Driver| {
        driver.config.next_used = 1;
        memory.atomic16(LAST_BATCH_HEAD).unwrap().store(SIZE, SeqCst);
    };
    assert!(refusal(far).contains("head 8 of its last batch is past the descriptor table"));
    assert!(refusal(|_, driver| driver.config.inflight.as_mut().unwrap().at = 4000).contains("are not guest memory"));
    assert!(refusal(|_, driver| driver.config.inflight.as_mut().unwrap().at += 4).contains("no multiple of 8"));
    assert!(refusal(|_, driver| driver.config.size = 16).contains("it has 8 entries and the ring 16"));
}

proptest! {
    #[test]
    fn garbage_in_the_region_ends_in_a_verdict(
        words in proptest::collection::vec(any::<u64>(), 16),
        told in 0..=SIZE,
        version in 0..3u16,
    ) {
        let (mut driver, memory) = tracked();
        for (index, word) in words.iter().enumerate() {
            memory.atomic64(state(0) + 8 * index as u64).unwrap().store(*word & 0x0007_0000_0000_0001, SeqCst);
        }
        for (at, value) in [(VERSION, version), (ENTRIES, SIZE), (LAST_BATCH_HEAD, words[0] as u16 % 9)] {
            memory.atomic16(at).unwrap().store(value, SeqCst);
        }
        driver.config.next_used = told;
        driver.store(USED + 2, told);
        driver.store(AVAIL + 2, told);
        let handler = crate::driver::Closure(|vq: &Arc<pyvirtio_core::VirtQueue>| {
            while let Some(mut chain) = vq.pop() {
                chain.complete().unwrap();
            }
        });
        if driver.vq.start(driver.memory.clone(), &driver.config, Arc::new(handler)).is_ok() {
            driver.vq.service();
            prop_assert!(driver.vq.in_flight() == 0);
        }
    }
}
