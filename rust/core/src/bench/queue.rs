//! One queue under load: its requests, what they are for, and what came of them.

use std::ops::Range;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::pattern::{fill, Random};
use super::ring::{Desc, Ring};
use super::{Alarms, Fault, Geometry, Load, Outcome, QueueSetup};
use crate::memory::GuestMemory;
use crate::GuestError;

/// Header at 0, status at 16, indirect table at 64.
pub const CONTROL_BYTES: u64 = 128;
const STATUS: u64 = 16;
const TABLE: u64 = 64;
const HEADER_BYTES: u32 = 16;
const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const SECTOR: u64 = 512;
const PENDING: u8 = 0xff;
/// A back-end that answers nothing for so long does not work.
const HANG: Duration = Duration::from_secs(10);
/// Looks at the used ring between two looks at the clock.
const LOOKS: u32 = 1000;
/// How long a sleep lasts at most before it is looked whether the run was aborted.
const SLEEP_MS: i32 = 100;

/// What a request is doing.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Slot {
    Free,
    Busy { block: u64, write: bool, since: Duration },
}

pub struct Queue {
    memory: GuestMemory,
    ring: Ring,
    kick: RawFd,
    call: RawFd,
    indirect: bool,
    block_size: u32,
    /// The blocks that belong to this queue.
    blocks: Range<u64>,
    /// How often each of them was written with content to verify.
    generations: Vec<u32>,
    /// Where the requests of this queue have their data and their control bytes.
    data: u64,
    control: u64,
    slots: Vec<Slot>,
    in_flight: u16,
    /// The next block in order.
    next: u64,
    scratch: Vec<u8>,
}

impl Queue {
    pub fn new(memory: &GuestMemory, geometry: Geometry, setup: QueueSetup, blocks: Range<u64>) -> Result<Self, Fault> {
        let Geometry { block_size, max_iodepth, .. } = geometry;
        let indirect = setup.ring.indirect;
        let per_slot = if indirect { 1 } else { 3 };
        if max_iodepth == 0 || max_iodepth.saturating_mul(per_slot) > setup.ring.size {
            let size = setup.ring.size;
            return Err(Fault(format!("iodepth {max_iodepth} does not fit a ring of {size} descriptors")));
        }
        if blocks.end - blocks.start <= u64::from(max_iodepth) {
            return Err(Fault(format!("{} blocks are too few for iodepth {max_iodepth}", blocks.end - blocks.start)));
        }
        let data_bytes = u64::from(max_iodepth) * u64::from(block_size);
        memory.check(setup.buffers, data_bytes + u64::from(max_iodepth) * CONTROL_BYTES)?;
        Ok(Self {
            ring: Ring::new(memory.clone(), &setup.ring, per_slot)?,
            memory: memory.clone(),
            kick: setup.kick,
            call: setup.call,
            indirect,
            block_size,
            next: blocks.start,
            generations: vec![0; (blocks.end - blocks.start) as usize],
            blocks,
            data: setup.buffers,
            control: setup.buffers + data_bytes,
            slots: vec![Slot::Free; max_iodepth.into()],
            in_flight: 0,
            scratch: vec![0; 2 * block_size as usize],
        })
    }

    /// Keep `iodepth` requests in flight until the load ends, then wait for the last.
    pub fn run(&mut self, load: &Load, alarms: Alarms, abort: &AtomicBool) -> Result<Outcome, Fault> {
        if usize::from(load.iodepth) > self.slots.len() || load.iodepth == 0 {
            return Err(Fault(format!("iodepth {} is not from 1 to {}", load.iodepth, self.slots.len())));
        }
        let mut run = Run { begin: Instant::now(), load, alarms, abort, outcome: Outcome::default(), offered: 0 };
        let mut random = Random(load.seed ^ self.blocks.start);
        let mut free: Vec<u16> = (0..load.iodepth).rev().collect();
        self.next = self.blocks.start;
        self.ring.set_interrupts(!load.poll);
        loop {
            let now = run.begin.elapsed();
            // One at least, however late it has become: the figures are divided by them.
            while run.offered == 0 || now < load.time && run.offered < load.requests {
                let Some(slot) = free.pop() else { break };
                self.offer(slot, load, &mut random, now)?;
                run.offered += 1;
            }
            if self.ring.publish() {
                run.outcome.kicks += 1;
                signal(self.kick);
            }
            if self.in_flight == 0 {
                return Ok(run.outcome);
            }
            let used = self.wait(&mut run)?;
            let now = run.begin.elapsed();
            for _ in 0..used {
                free.push(self.reap(&mut run, now)?);
            }
        }
    }

    /// Put a request into the ring.
    fn offer(&mut self, slot: u16, load: &Load, random: &mut Random, now: Duration) -> Result<(), Fault> {
        let write = load.write_percent > 0 && random.below(100) < load.write_percent.into();
        let block = self.choose(load, random);
        let (data, control) = self.places(slot);
        let header = u128::from(if write { T_OUT } else { T_IN })
            | u128::from(block * u64::from(self.block_size) / SECTOR) << 64;
        self.memory.write(control, &header.to_le_bytes())?;
        self.memory.write(control + STATUS, &[PENDING])?;
        if write && load.verify {
            self.write_content(block, data)?;
        }
        let data = if write { Desc::readable } else { Desc::writable }(data, self.block_size);
        let chain = [Desc::readable(control, HEADER_BYTES), data, Desc::writable(control + STATUS, 1)];
        if self.indirect {
            self.memory.write(control + TABLE, &self.ring.table(&chain))?;
            self.ring.offer(slot, &[Desc::table(control + TABLE, chain.len())]);
        } else {
            self.ring.offer(slot, &chain);
        }
        self.slots[usize::from(slot)] = Slot::Busy { block, write, since: now };
        self.in_flight += 1;
        Ok(())
    }

    /// The block to go for. Verified, no two requests for one block are in flight at once: either could win.
    fn choose(&mut self, load: &Load, random: &mut Random) -> u64 {
        loop {
            let block = if load.random {
                self.blocks.start + random.below(self.blocks.end - self.blocks.start)
            } else {
                let next = self.next;
                self.next = if next + 1 == self.blocks.end { self.blocks.start } else { next + 1 };
                next
            };
            let is_busy = |slot: &Slot| matches!(slot, Slot::Busy { block: other, .. } if *other == block);
            if !load.verify || !self.slots.iter().any(is_busy) {
                return block;
            }
        }
    }

    /// Guest addresses of a request's data and control bytes.
    fn places(&self, slot: u16) -> (u64, u64) {
        let slot = u64::from(slot);
        (self.data + slot * u64::from(self.block_size), self.control + slot * CONTROL_BYTES)
    }

    fn write_content(&mut self, block: u64, data: u64) -> Result<(), Fault> {
        let generation = &mut self.generations[(block - self.blocks.start) as usize];
        *generation = generation.wrapping_add(1).max(1);
        let content = &mut self.scratch[..self.block_size as usize];
        fill(content, block, *generation);
        Ok(self.memory.write(data, content)?)
    }

    fn check_content(&mut self, block: u64, data: u64) -> Result<(), Fault> {
        let generation = self.generations[(block - self.blocks.start) as usize];
        if generation == 0 {
            return Ok(());
        }
        let (expected, found) = self.scratch.split_at_mut(self.block_size as usize);
        fill(expected, block, generation);
        self.memory.read(data, found)?;
        match expected.iter().zip(&*found).position(|(expected, found)| expected != found) {
            None => Ok(()),
            Some(at) => {
                let (offset, expected, found) =
                    (block * u64::from(self.block_size) + at as u64, expected[at], found[at]);
                Err(Fault(format!("wrong data at byte {offset}: {found:#04x} was read, {expected:#04x} was written")))
            }
        }
    }

    /// Wait until the device has given something back; how much.
    fn wait(&self, run: &mut Run<'_>) -> Result<u16, Fault> {
        let asleep = Instant::now();
        loop {
            let used = self.look(run);
            if used > self.in_flight {
                let in_flight = self.in_flight;
                return Err(Fault(format!("{used} requests were given back, and {in_flight} were in flight")));
            }
            if used > 0 {
                return Ok(used);
            }
            if run.abort.load(Ordering::Relaxed) {
                return Err(Fault("another queue failed".into()));
            }
            if asleep.elapsed() > HANG {
                let seconds = HANG.as_secs();
                return Err(Fault(format!("no request of {} was answered for {seconds} s", self.in_flight)));
            }
            if run.is_slow(asleep) {
                run.alarms.check()?;
            }
        }
    }

    /// Look for a while, or sleep until there is an interrupt.
    fn look(&self, run: &mut Run<'_>) -> u16 {
        if run.load.poll {
            for _ in 0..LOOKS {
                if self.ring.used() > 0 {
                    break;
                }
                std::hint::spin_loop();
            }
            return self.ring.used();
        }
        self.ring.set_interrupts(true);
        if self.ring.used() == 0 && run.alarms.sleep(self.call) {
            run.outcome.interrupts += 1;
        }
        self.ring.used()
    }

    /// Take one request back; its slot.
    fn reap(&mut self, run: &mut Run<'_>, now: Duration) -> Result<u16, Fault> {
        let slot = self.ring.pop().filter(|slot| usize::from(*slot) < self.slots.len());
        let Some((slot, Slot::Busy { block, write, since })) = slot.map(|slot| (slot, self.slots[usize::from(slot)]))
        else {
            return Err(Fault("a request was given back that was not in flight".into()));
        };
        self.slots[usize::from(slot)] = Slot::Free;
        self.in_flight -= 1;
        let (data, control) = self.places(slot);
        let mut status = [PENDING];
        self.memory.read(control + STATUS, &mut status)?;
        run.count(write, status[0], now - since);
        if status[0] != 0 && write {
            self.generations[(block - self.blocks.start) as usize] = 0; // what it contains is anything
        } else if status[0] == 0 && !write && run.load.verify {
            self.check_content(block, data)?;
        }
        Ok(slot)
    }
}

/// A load under way.
struct Run<'a> {
    begin: Instant,
    load: &'a Load,
    alarms: Alarms,
    abort: &'a AtomicBool,
    outcome: Outcome,
    offered: u64,
}

impl Run<'_> {
    fn count(&mut self, write: bool, status: u8, latency: Duration) {
        self.outcome.reads += u64::from(!write);
        self.outcome.writes += u64::from(write);
        self.outcome.errors += u64::from(status != 0);
        self.outcome.latencies.record(latency.as_nanos() as u64);
    }

    /// Whether it pays to ask the kernel something.
    fn is_slow(&self, since: Instant) -> bool {
        since.elapsed() > Duration::from_millis(10)
    }
}

impl From<GuestError> for Fault {
    fn from(error: GuestError) -> Self {
        Self(error.0)
    }
}

fn signal(fd: RawFd) {
    let one = 1u64.to_ne_bytes();
    // SAFETY: writes 8 bytes of ours; a full eventfd is signalled already.
    unsafe { libc::write(fd, one.as_ptr().cast(), one.len()) };
}

impl Alarms {
    fn polled(&self) -> [libc::pollfd; 2] {
        [
            libc::pollfd { fd: self.connection, events: libc::POLLRDHUP, revents: 0 },
            libc::pollfd { fd: self.err, events: libc::POLLIN, revents: 0 },
        ]
    }

    fn check(&self) -> Result<(), Fault> {
        let mut fds = self.polled();
        // SAFETY: two valid entries.
        unsafe { libc::poll(fds.as_mut_ptr(), 2, 0) };
        match fds.map(|fd| fd.revents != 0) {
            [true, _] => Err(Fault("the back-end hung up".into())),
            [_, true] => Err(Fault("the back-end says that the device is broken".into())),
            _ => Ok(()),
        }
    }

    /// Sleep until the call fd is signalled, and clear it; false if something else ended the sleep.
    fn sleep(&self, call: RawFd) -> bool {
        let [connection, err] = self.polled();
        let mut fds = [libc::pollfd { fd: call, events: libc::POLLIN, revents: 0 }, connection, err];
        // SAFETY: three valid entries.
        let ready = unsafe { libc::poll(fds.as_mut_ptr(), 3, SLEEP_MS) };
        if ready <= 0 || fds[0].revents == 0 {
            return false;
        }
        let mut count = [0u8; 8];
        // SAFETY: reads into 8 bytes of ours.
        unsafe { libc::read(call, count.as_mut_ptr().cast(), count.len()) == 8 }
    }
}
