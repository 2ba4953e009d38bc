//! The driver of a disk under load: its requests, what they are for, and what came of them.

use std::ops::Range;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use super::lane::{Lane, Pace, Signals, Work};
use super::latency::Latencies;
use super::pattern::{fill, Random};
use super::ring::{Desc, Ring};
use super::{together, Fault, Job, QueueSetup};
use crate::memory::GuestMemory;

/// Bytes of guest memory that a request needs besides its data: header at 0, status at 16, indirect table at 64.
pub const CONTROL_BYTES: u64 = 128;
const STATUS: u64 = 16;
const TABLE: u64 = 64;
const HEADER_BYTES: u32 = 16;
const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const SECTOR: u64 = 512;
const PENDING: u8 = 0xff;

/// What all loads of a driver have in common. A queue's buffers are
/// `max_iodepth * (block_size + CONTROL_BYTES)` bytes.
#[derive(Debug, Clone, Copy)]
pub struct Geometry {
    pub block_size: u32,
    /// Blocks of the disk that are used, from its beginning.
    pub blocks: u64,
    pub max_iodepth: u16,
}

/// What one run does. It ends after `time` or `requests` of each queue, whichever comes first.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    pub write_percent: u8,
    pub random: bool,
    pub iodepth: u16,
    pub time: Duration,
    pub requests: u64,
    /// Look at the used ring all the time; else sleep until the back-end interrupts.
    pub poll: bool,
    /// Write what can be told from anything else, and check what is read where it was written before.
    pub verify: bool,
    pub seed: u64,
}

/// What a run found.
#[derive(Debug, Default)]
pub struct Outcome {
    pub reads: u64,
    pub writes: u64,
    /// Requests that the back-end answered with an error.
    pub errors: u64,
    pub signals: Signals,
    pub latencies: Latencies,
    pub elapsed: Duration,
}

impl Outcome {
    fn add(&mut self, other: &Self) {
        self.reads += other.reads;
        self.writes += other.writes;
        self.errors += other.errors;
        self.signals.add(other.signals);
        self.latencies.add(&other.latencies);
    }
}

/// A driver of any number of queues, each on a thread of its own while a load runs.
pub struct Driver {
    queues: Vec<(Lane, Part)>,
    max_iodepth: u16,
}

impl Driver {
    pub fn new(memory: &GuestMemory, geometry: Geometry, setups: &[QueueSetup]) -> Result<Self, Fault> {
        let share = geometry.blocks / (setups.len() as u64).max(1);
        let queues = setups
            .iter()
            .zip(0..)
            .map(|(setup, n)| {
                let per_slot = if setup.ring.indirect { 1 } else { 3 };
                let lane = Lane::new(memory, setup, geometry.max_iodepth, per_slot)?;
                Ok((lane, Part::new(memory, geometry, setup, n * share..(n + 1) * share)?))
            })
            .collect::<Result<_, Fault>>()?;
        Ok(Self { queues, max_iodepth: geometry.max_iodepth })
    }

    /// Run a load to its end, with nothing in flight before and after. A fault of any queue ends all of them.
    pub fn run(&mut self, load: &Load) -> Result<Outcome, Fault> {
        if !(1..=self.max_iodepth).contains(&load.iodepth) {
            return Err(Fault(format!("iodepth {} is not from 1 to {}", load.iodepth, self.max_iodepth)));
        }
        if self.queues.iter().any(|(_, part)| part.requests.iter().any(Option::is_some)) {
            return Err(Fault("requests of a run that failed are in flight still".into()));
        }
        let begin = Instant::now();
        let job = |(lane, part)| Box::new(move |abort: &AtomicBool| run(lane, part, load, abort)) as Job<'_, Outcome>;
        let jobs = self.queues.iter_mut().map(|(lane, part)| job((lane, part))).collect();
        let ends = together(jobs)?;
        let mut all = Outcome { elapsed: begin.elapsed(), ..Outcome::default() };
        ends.iter().for_each(|end| all.add(end));
        Ok(all)
    }
}

/// Keep `iodepth` requests in flight until the load ends, then wait for the last.
fn run(lane: &mut Lane, part: &mut Part, load: &Load, abort: &AtomicBool) -> Result<Outcome, Fault> {
    let pace = Pace { begin: Instant::now(), time: load.time, burst: load.iodepth, poll: load.poll, abort };
    let random = Random(load.seed ^ part.blocks.start);
    part.next = part.blocks.start;
    let mut run = Run { part, load, random, outcome: Outcome::default(), offered: 0 };
    let signals = lane.run(&mut run, &pace)?;
    Ok(Outcome { signals, ..run.outcome })
}

/// A request that is under way.
#[derive(Clone, Copy)]
struct Request {
    block: u64,
    write: bool,
    since: Duration,
}

/// A queue's part of the disk, and of guest memory.
struct Part {
    memory: GuestMemory,
    indirect: bool,
    block_size: u32,
    /// The blocks that belong to this queue.
    blocks: Range<u64>,
    /// How often each of them was written with content to verify.
    generations: Vec<u32>,
    /// Where the requests of this queue have their data and their control bytes.
    data: u64,
    control: u64,
    /// By slot.
    requests: Vec<Option<Request>>,
    /// The next block in order.
    next: u64,
    scratch: Vec<u8>,
}

impl Part {
    fn new(memory: &GuestMemory, geometry: Geometry, setup: &QueueSetup, blocks: Range<u64>) -> Result<Self, Fault> {
        let Geometry { block_size, max_iodepth, .. } = geometry;
        if blocks.end - blocks.start <= u64::from(max_iodepth) {
            return Err(Fault(format!("{} blocks are too few for iodepth {max_iodepth}", blocks.end - blocks.start)));
        }
        let data_bytes = u64::from(max_iodepth) * u64::from(block_size);
        memory.check(setup.buffers, data_bytes + u64::from(max_iodepth) * CONTROL_BYTES)?;
        Ok(Self {
            memory: memory.clone(),
            indirect: setup.ring.indirect,
            block_size,
            next: blocks.start,
            generations: vec![0; (blocks.end - blocks.start) as usize],
            blocks,
            data: setup.buffers,
            control: setup.buffers + data_bytes,
            requests: vec![None; max_iodepth.into()],
            scratch: vec![0; 2 * block_size as usize],
        })
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
            if !load.verify || !self.requests.iter().flatten().any(|request| request.block == block) {
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
}

/// A load under way.
struct Run<'a> {
    part: &'a mut Part,
    load: &'a Load,
    random: Random,
    outcome: Outcome,
    offered: u64,
}

impl Work for Run<'_> {
    fn wants(&self, in_flight: u16, now: Duration) -> bool {
        // One at least, however late it has become: the figures are divided by them.
        let lasts = self.offered == 0 || now < self.load.time && self.offered < self.load.requests;
        lasts && in_flight < self.load.iodepth
    }

    fn offer(&mut self, ring: &mut Ring, slot: u16, now: Duration) -> Result<(), Fault> {
        let (part, load) = (&mut *self.part, self.load);
        let write = load.write_percent > 0 && self.random.below(100) < load.write_percent.into();
        let block = part.choose(load, &mut self.random);
        let (data, control) = part.places(slot);
        let header = u128::from(if write { T_OUT } else { T_IN })
            | u128::from(block * u64::from(part.block_size) / SECTOR) << 64;
        part.memory.write(control, &header.to_le_bytes())?;
        part.memory.write(control + STATUS, &[PENDING])?;
        if write && load.verify {
            part.write_content(block, data)?;
        }
        let data = if write { Desc::readable } else { Desc::writable }(data, part.block_size);
        let chain = [Desc::readable(control, HEADER_BYTES), data, Desc::writable(control + STATUS, 1)];
        if part.indirect {
            part.memory.write(control + TABLE, &ring.table(&chain))?;
            ring.offer(slot, &[Desc::table(control + TABLE, chain.len())]);
        } else {
            ring.offer(slot, &chain);
        }
        part.requests[usize::from(slot)] = Some(Request { block, write, since: now });
        self.offered += 1;
        Ok(())
    }

    fn reap(&mut self, slot: u16, _: u32, now: Duration) -> Result<(), Fault> {
        let (part, outcome) = (&mut *self.part, &mut self.outcome);
        let Some(Request { block, write, since }) = part.requests[usize::from(slot)].take() else {
            return Err(Fault(format!("slot {slot} has no request")));
        };
        let (data, control) = part.places(slot);
        let mut status = [PENDING];
        part.memory.read(control + STATUS, &mut status)?;
        let failed = status[0] != 0;
        outcome.reads += u64::from(!write);
        outcome.writes += u64::from(write);
        outcome.errors += u64::from(failed);
        outcome.latencies.record((now - since).as_nanos() as u64);
        if failed && write {
            part.generations[(block - part.blocks.start) as usize] = 0; // what it contains is anything
        } else if !failed && !write && self.load.verify {
            part.check_content(block, data)?;
        }
        Ok(())
    }

    fn is_over(&self, in_flight: u16, _: Duration) -> bool {
        in_flight == 0
    }
}
