//! A process that serves a queue is killed between any two instructions, and the next one loses and repeats nothing.
//!
//! It is single-stepped, and what it leaves in memory after each instruction is kept.

use std::arch::asm;
use std::cell::Cell;
use std::ptr;
use std::sync::{Arc, Mutex};

use pyvirtio_core::{GuestMemory, InflightRegion, VirtQueue};

use crate::driver::{Driver, BUFFERS, DESC, SIZE, USED, WRITE};
use crate::packed_driver::PackedDriver;

const REGION: u64 = 32 + 32 * SIZE as u64;
const MOST: usize = 4096;

/// Guest memory that is looked at: its address and its bytes.
type Part<'a> = (&'a GuestMemory, u64, u64);

/// What was in some memory, whenever it changed.
struct Recorder {
    watched: Vec<(*const u8, usize)>,
    now: Vec<u8>,
    states: Vec<u8>,
}

impl Recorder {
    fn new(parts: &[Part<'_>]) -> Self {
        let place = |&(memory, at, size): &Part<'_>| (memory.host(at, size).unwrap().cast_const(), size as usize);
        let watched: Vec<_> = parts.iter().map(place).collect();
        let size = watched.iter().map(|part| part.1).sum();
        let mut recorder = Self { watched, now: vec![0; size], states: Vec::with_capacity(MOST * size) };
        recorder.look();
        recorder
    }

    /// Runs in a signal handler: allocates nothing.
    fn look(&mut self) {
        let mut at = 0;
        for &(start, size) in &self.watched {
            // SAFETY: guest memory that the recorder's owner keeps mapped, and nobody else writes now.
            unsafe { ptr::copy_nonoverlapping(start, self.now[at..at + size].as_mut_ptr(), size) };
            at += size;
        }
        if !self.states.ends_with(&self.now) {
            assert!(self.states.len() + at <= self.states.capacity());
            self.states.extend_from_slice(&self.now);
        }
    }
}

thread_local! {
    static RECORDER: Cell<*mut Recorder> = const { Cell::new(ptr::null_mut()) };
}

extern "C" fn on_step(_: libc::c_int) {
    // SAFETY: set while `stepped` runs on this thread, which is in here.
    unsafe { (*RECORDER.get()).look() };
}

/// Trap after each instruction, or no longer.
fn set_trap_flag(on: bool) {
    const TRAP: u64 = 1 << 8;
    let bit = if on { TRAP } else { 0 };
    // SAFETY: changes the one flag, for which `stepped` has a handler.
    unsafe {
        asm!("pushfq", "and qword ptr [rsp], {rest}", "or [rsp], {bit}", "popfq", rest = const !(TRAP as i32), bit = in(reg) bit);
    }
}

/// Do it step by step; the states of the memory, each different from the one before.
fn stepped(parts: &[Part<'_>], work: impl FnOnce()) -> Vec<Vec<u8>> {
    let mut recorder = Recorder::new(parts);
    RECORDER.set(&raw mut recorder);
    // SAFETY: the handler calls nothing that allocates or locks.
    unsafe { libc::signal(libc::SIGTRAP, on_step as extern "C" fn(libc::c_int) as usize) };
    set_trap_flag(true);
    work();
    set_trap_flag(false);
    recorder.states.chunks(recorder.now.len()).map(<[u8]>::to_vec).collect()
}

fn restore(parts: &[Part<'_>], mut state: &[u8]) {
    for &(memory, at, size) in parts {
        let (here, rest) = state.split_at(size as usize);
        memory.write(at, here).unwrap();
        state = rest;
    }
}

/// What both drivers do here.
trait Ring {
    fn device(&self) -> &Driver;
    fn next_device(&self) -> Self;
    fn ids(&mut self) -> Vec<u16>;
}

impl Ring for Driver {
    fn device(&self) -> &Driver {
        self
    }
    fn next_device(&self) -> Self {
        self.with_a_new_device()
    }
    fn ids(&mut self) -> Vec<u16> {
        self.used().iter().map(|used| used.0 as u16).collect()
    }
}

impl Ring for PackedDriver {
    fn device(&self) -> &Driver {
        self
    }
    fn next_device(&self) -> Self {
        self.with_a_new_device()
    }
    fn ids(&mut self) -> Vec<u16> {
        self.used().iter().map(|used| used.0).collect()
    }
}

/// Take all chains and complete the last three, in a batch and a late one; keep the first.
fn serve_some(device: &Driver) {
    let held = Arc::new(Mutex::new(Vec::new()));
    let kept = held.clone();
    device.start(move |vq: &Arc<VirtQueue>| {
        let mut held = kept.lock().unwrap();
        held.extend(std::iter::from_fn(|| vq.pop()));
        for _ in 0..2 {
            if let Some(mut chain) = held.pop() {
                chain.complete().unwrap();
            }
        }
    });
    device.vq.service();
    if let Some(mut chain) = held.lock().unwrap().pop() {
        chain.complete().unwrap();
    }
    device.vq.stop(); // it notes nothing: what is held is forgotten as a kill does it
}

/// Whatever a process left, the next one answers each request that was not answered, once.
fn assert_nothing_is_lost(driver: &impl Ring, parts: &[Part<'_>], states: &[Vec<u8>], ids: &[u16]) {
    for (n, state) in states.iter().enumerate() {
        restore(parts, state);
        let mut next = driver.next_device();
        next.device().start_completing();
        next.device().vq.service();
        assert_eq!(next.device().broken(), "", "state {n} of {}", states.len());
        let mut answered = next.ids();
        answered.sort_unstable();
        assert_eq!(answered, ids, "state {n} of {}", states.len());
    }
}

/// Kill the first process anywhere, then, for one of its ends, the second one anywhere.
fn survives_kills(driver: &impl Ring, parts: &[Part<'_>], ids: &[u16]) {
    let states = stepped(parts, || serve_some(driver.device()));
    assert!(states.len() > 10, "{} states", states.len());
    assert_nothing_is_lost(driver, parts, &states, ids);
    restore(parts, &states[states.len() / 2]);
    let second = driver.next_device();
    let states = stepped(parts, || serve_some(second.device()));
    assert_nothing_is_lost(driver, parts, &states, ids);
}

fn region() -> InflightRegion {
    InflightRegion { memory: GuestMemory::allocate(&[(0, 4096)]).unwrap(), at: 0, entries: SIZE }
}

#[test]
fn a_split_ring_survives_kills() {
    let region = region();
    let mut driver = Driver::with(|config| config.inflight = Some(region.clone()));
    for id in [5, 2, 7, 0] {
        driver.add(id);
    }
    let memory = driver.memory.clone();
    survives_kills(&driver, &[(&memory, USED, 4 + 8 * u64::from(SIZE)), (&region.memory, 0, REGION)], &[0, 2, 5, 7]);
}

#[test]
fn a_packed_ring_survives_kills() {
    let region = region();
    let mut driver = PackedDriver::with(|config| config.inflight = Some(region.clone()));
    for (id, descs) in [(5, 3), (2, 1), (7, 2), (0, 1)] {
        driver.chain(&vec![(BUFFERS, 1, WRITE); descs], id);
    }
    let memory = driver.memory.clone();
    survives_kills(&driver, &[(&memory, DESC, 16 * u64::from(SIZE)), (&region.memory, 0, REGION)], &[0, 2, 5, 7]);
}
