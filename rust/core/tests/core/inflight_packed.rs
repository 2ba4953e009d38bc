//! Requests of a packed ring that are in flight when the device's process ends are done again by the next one.

use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use pyvirtio_core::{Chain, GuestMemory, InflightRegion, VirtQueue};

use crate::driver::{Closure, BUFFERS, SIZE, WRITE};
use crate::packed_driver::{PackedDriver, FRESH};

const AT: u64 = 320;
const FREE: u64 = AT + 8;
const USED_WORD: u64 = AT + 16;

fn entry(index: u64) -> u64 {
    AT + 32 + 32 * index
}

fn tracked() -> (PackedDriver, GuestMemory) {
    let memory = GuestMemory::allocate(&[(0, 4096)]).unwrap();
    let region = InflightRegion { memory: memory.clone(), at: AT, entries: SIZE };
    (PackedDriver::with(|config| config.inflight = Some(region)), memory)
}

/// The ids that a new device serves, in that order.
fn served_after_a_crash(driver: &PackedDriver) -> Vec<u16> {
    let next = driver.with_a_new_device();
    let ids = Arc::new(Mutex::new(Vec::new()));
    let seen = ids.clone();
    next.start(move |vq| {
        while let Some(mut chain) = vq.pop() {
            seen.lock().unwrap().push(chain.head());
            chain.complete().unwrap();
        }
    });
    next.vq.service();
    assert_eq!(next.broken(), "");
    let ids = ids.lock().unwrap().clone();
    ids
}

fn ids(used: &[(u16, u32)]) -> Vec<u16> {
    used.iter().map(|used| used.0).collect()
}

#[test]
fn what_was_taken_and_not_given_back_is_done_again_in_order_and_before_what_is_new() {
    let (mut driver, _) = tracked();
    for id in [5, 1, 4, 2] {
        driver.add(id);
    }
    let mut chains: Vec<_> = (0..4).map(|_| driver.pop().unwrap()).collect();
    chains[1].complete().unwrap();
    driver.add(7);
    assert_eq!(served_after_a_crash(&driver), [5, 4, 2, 7]);
    assert_eq!(ids(&driver.used()), [1, 5, 4, 2, 7]);
    assert!(served_after_a_crash(&driver).is_empty());
    std::mem::forget(chains);
}

#[test]
fn a_chain_is_done_again_from_its_descriptors_though_the_ring_has_others_there() {
    let (mut driver, _) = tracked();
    driver.memory.write(BUFFERS, b"kept").unwrap();
    driver.chain(&[(BUFFERS, 2, 0), (BUFFERS + 2, 2, 0), (BUFFERS + 64, 4, WRITE)], 6);
    driver.add(1);
    driver.add(2);
    driver.add(3);
    let mut chains: Vec<_> = (0..4).map(|_| driver.pop().unwrap()).collect();
    for chain in &mut chains[1..] {
        chain.complete().unwrap(); // the three used descriptors lie where the first chain was
    }
    let next = driver.with_a_new_device();
    let mut chain = next.pop().unwrap();
    let mut text = [0; 4];
    chain.read(&mut text).unwrap();
    assert_eq!((chain.head(), &text), (6, b"kept"));
    chain.complete().unwrap();
    assert_eq!(ids(&driver.used()), [1, 2, 3, 6]);
    std::mem::forget(chains);
}

/// The region as if killed between telling the driver and noting it, or in front of it: with the ring as it is then.
fn killed_around_publishing(told: bool) -> Vec<u16> {
    let (mut driver, memory) = tracked();
    for id in 0..3 {
        driver.add(id);
    }
    let mut chains: Vec<_> = (0..3).map(|_| driver.pop().unwrap()).collect();
    let word = |at| memory.atomic64(at).unwrap();
    let (free, used) = (word(FREE).load(SeqCst), word(USED_WORD).load(SeqCst));
    let ring = driver.memory.clone();
    let mut before = vec![0; 16 * usize::from(SIZE)];
    ring.read(crate::driver::DESC, &mut before).unwrap();
    chains[1].complete().unwrap();
    let keep_old = |new: u64, old: u64, mask: u64| new & !mask | old & mask;
    word(FREE).store(keep_old(word(FREE).load(SeqCst), free, 0xffff << 48), SeqCst);
    word(USED_WORD).store(keep_old(word(USED_WORD).load(SeqCst), used, 0xff00_ffff_0000), SeqCst);
    word(entry(1)).fetch_or(1, SeqCst);
    if !told {
        ring.write(crate::driver::DESC, &before).unwrap();
    }
    std::mem::forget(chains);
    served_after_a_crash(&driver)
}

#[test]
fn what_the_driver_was_told_of_is_not_done_again_and_everything_else_is() {
    assert_eq!(killed_around_publishing(true), [0, 2]);
    assert_eq!(killed_around_publishing(false), [0, 1, 2]);
}

#[test]
fn a_buffer_id_that_is_in_flight_already_breaks_the_device() {
    let (mut driver, _) = tracked();
    driver.add(3);
    driver.add(3);
    let first = driver.pop();
    assert!(driver.pop().is_none());
    assert!(driver.broken().contains("buffer id 3 is in flight already"));
    drop(first);
}

#[test]
fn an_orderly_stop_leaves_nothing_to_do_again() {
    let (mut driver, _) = tracked();
    driver.start_completing();
    driver.add(4);
    driver.vq.service();
    assert_eq!(driver.vq.stop(), (1 | FRESH, 1 | FRESH));
    driver.add(0);
    assert_eq!(served_after_a_crash(&driver), [0]);
}

#[test]
fn a_chain_that_was_not_needed_is_the_next_also_after_a_crash() {
    let (mut driver, _) = tracked();
    driver.chain(&[(BUFFERS, 1, WRITE), (BUFFERS, 1, WRITE)], 2);
    driver.add(6);
    let chain = driver.pop().unwrap();
    driver.vq.unpop(chain);
    let mut again = driver.pop().unwrap();
    assert_eq!(again.head(), 2);
    again.complete().unwrap();
    let chain = driver.pop().unwrap();
    driver.vq.unpop(chain);
    assert_eq!(served_after_a_crash(&driver), [6]);
}

#[derive(Debug, Clone)]
enum Step {
    Add(u16),
    Take,
    Complete(usize),
    Crash,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (1..4u16).prop_map(Step::Add),
        4 => Just(Step::Take),
        4 => (0..8usize).prop_map(Step::Complete),
        1 => Just(Step::Crash),
    ];
    proptest::collection::vec(step, 1..200)
}

proptest! {
    /// However often the device dies, each request is answered once, and those in flight are done again in order.
    #[test]
    fn every_request_is_answered_once(steps in steps()) {
        let (mut driver, _) = tracked();
        let (mut free, mut held): (Vec<u16>, Vec<Chain>) = ((0..SIZE).collect(), Vec::new());
        let mut waiting = Vec::new();
        for step in steps {
            match step {
                Step::Add(descs) if descs <= driver.room() => {
                    let id = free.remove(0);
                    driver.chain(&vec![(BUFFERS, 1, WRITE); descs.into()], id);
                    waiting.push(id);
                }
                Step::Take => held.extend(driver.pop()),
                Step::Complete(index) if index < held.len() => {
                    let mut chain = held.remove(index);
                    chain.complete().unwrap();
                    let used = ids(&driver.used());
                    prop_assert_eq!(&used, &[chain.head()]);
                    waiting.retain(|id| *id != chain.head());
                    free.extend(used);
                }
                Step::Crash => {
                    let taken: Vec<u16> = held.iter().map(Chain::head).collect();
                    driver.vq.stop(); // which notes nothing: the chains are forgotten as a kill does it
                    held.clear();
                    driver = driver.with_a_new_device();
                    held.extend((0..taken.len()).map(|_| driver.pop().unwrap()));
                    let mut expected = taken;
                    expected.sort_by_key(|id| waiting.iter().position(|other| other == id));
                    prop_assert_eq!(held.iter().map(Chain::head).collect::<Vec<_>>(), expected);
                }
                _ => (),
            }
            prop_assert_eq!(driver.broken(), "");
        }
        driver.vq.stop();
    }

    #[test]
    fn garbage_in_the_region_ends_in_a_verdict(
        header in any::<[u16; 6]>(),
        words in proptest::collection::vec(any::<u64>(), 4 * usize::from(SIZE)),
        narrow in any::<bool>(),
        version in 0..3u16,
    ) {
        let (driver, memory) = tracked();
        let mask = if narrow { 0x0007_0007_0007_0001 } else { u64::MAX };
        for (index, word) in words.iter().enumerate() {
            memory.atomic64(entry(0) + 8 * index as u64).unwrap().store(*word & mask, SeqCst);
        }
        let fields = [version, SIZE].into_iter().chain(header.map(|field| if narrow { field % 9 } else { field }));
        for (index, field) in fields.enumerate() {
            memory.atomic16(FREE + 2 * index as u64).unwrap().store(field, SeqCst);
        }
        let handler = Closure(|vq: &Arc<VirtQueue>| {
            while let Some(mut chain) = vq.pop() {
                chain.complete().unwrap();
            }
        });
        if driver.vq.start(driver.memory.clone(), &driver.config, Arc::new(handler)).is_ok() {
            driver.vq.service();
            prop_assert!(driver.vq.in_flight() == 0 || driver.broken() != "");
        }
    }
}
