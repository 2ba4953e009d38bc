//! The driver of a network card under load: what it sends, what it receives, and what became of frames on their way.

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::frame::{self, Content, LEAST};
use super::lane::{Lane, Pace, Signals, Work};
use super::ring::{Desc, Ring};
use super::verdict::{Seen, Verdict};
use super::{together, Fault, Job, QueueSetup};
use crate::memory::GuestMemory;
use crate::planes::net::HEADER;

/// How long a run waits for its first frame when the time is over.
const SILENCE: Duration = Duration::from_secs(2);
/// Frames of ours that are still under way come within so long of each other.
const QUIET: Duration = Duration::from_millis(500);
/// How long they are waited for, if there is no end of them.
const LATEST: Duration = Duration::from_secs(5);

/// What one run does.
#[derive(Debug, Clone, Copy)]
pub struct Transfer {
    /// Bytes of each frame that is sent.
    pub frame_size: u32,
    /// Frames, or receive buffers, that are offered before the device is told, at most.
    pub burst: u16,
    pub time: Duration,
    /// Look at the used rings all the time; else sleep until the back-end interrupts.
    pub poll: bool,
    /// Send frames that can be told from any others, and look at those that come.
    pub verify: bool,
}

/// What a run found.
#[derive(Debug, Default, Clone, Copy)]
pub struct Traffic {
    pub sent: Count,
    pub received: Count,
    pub signals: Signals,
    pub elapsed: Duration,
}

#[derive(Debug, Default, Clone, Copy)]
pub struct Count {
    pub frames: u64,
    pub bytes: u64,
}

impl Count {
    fn add(&mut self, other: Self) {
        self.frames += other.frames;
        self.bytes += other.bytes;
    }

    fn one(&mut self, bytes: usize) {
        self.add(Self { frames: 1, bytes: bytes as u64 });
    }
}

/// The driver of transmit and receive queues, of one device or several, each on a thread of its own in a run.
pub struct Driver {
    transmitters: Vec<(Lane, Transmitter)>,
    receivers: Vec<(Lane, Receiver)>,
}

impl Driver {
    /// Each descriptor of a ring has `room` bytes of its queue's buffers, for header and frame. Sequence numbers begin
    /// with `first`: a larger one each time tells what a network kept from before.
    pub fn new(
        memory: &GuestMemory,
        room: u32,
        transmit: &[QueueSetup],
        receive: &[QueueSetup],
        first: u64,
    ) -> Result<Self, Fault> {
        if (room as usize) < HEADER + LEAST {
            return Err(Fault(format!("{room} bytes are too few for a header and a frame")));
        }
        let lane = |setup: &QueueSetup| Lane::new(memory, setup, setup.ring.size, 1);
        let scratch = vec![0; room as usize];
        let transmitter = |(stream, setup): (u16, &QueueSetup)| {
            let buffers = Buffers::new(memory, setup, room)?;
            Ok((lane(setup)?, Transmitter { buffers, stream, first, next: first, scratch: scratch.clone() }))
        };
        let receiver = |setup: &QueueSetup| {
            let (buffers, firsts) = (Buffers::new(memory, setup, room)?, vec![first; transmit.len()]);
            Ok((lane(setup)?, Receiver { buffers, firsts, seen: Seen::default(), scratch: scratch.clone() }))
        };
        Ok(Self {
            transmitters: (0..).zip(transmit).map(transmitter).collect::<Result<_, Fault>>()?,
            receivers: receive.iter().map(receiver).collect::<Result<_, Fault>>()?,
        })
    }

    /// Send and receive for some time, and until all that was sent has been taken by the device.
    pub fn run(&mut self, transfer: &Transfer) -> Result<Traffic, Fault> {
        self.check(transfer)?;
        let (begin, sending) = (Instant::now(), AtomicUsize::new(self.transmitters.len()));
        let (sending, came) = (&sending, &AtomicBool::new(false));
        let mut jobs: Vec<Job<'_, Traffic>> = Vec::new();
        for (lane, transmitter) in &mut self.transmitters {
            jobs.push(Box::new(move |abort| {
                let end = transmitter.run(lane, transfer, abort);
                sending.fetch_sub(1, Ordering::Relaxed);
                end
            }));
        }
        for (lane, receiver) in &mut self.receivers {
            jobs.push(Box::new(move |abort| receiver.run(lane, transfer, Until::Sent(sending, came), abort)));
        }
        let mut all = Traffic::default();
        for end in together(jobs)? {
            all.sent.add(end.sent);
            all.received.add(end.received);
            all.signals.add(end.signals);
        }
        Ok(Traffic { elapsed: begin.elapsed(), ..all })
    }

    /// Receive what is still under way, and judge all frames since the last time. Only after runs that verify.
    pub fn settle(&mut self, poll: bool) -> Result<Verdict, Fault> {
        let late = Transfer { frame_size: 0, burst: u16::MAX, time: Duration::ZERO, poll, verify: true };
        let sent: u64 = self.transmitters.iter().map(|(_, transmitter)| transmitter.next - transmitter.first).sum();
        let came: u64 =
            self.receivers.iter().map(|(_, receiver)| receiver.seen.of_streams(self.transmitters.len())).sum();
        let missing = &AtomicI64::new(sent as i64 - came as i64);
        let mut jobs: Vec<Job<'_, Traffic>> = Vec::new();
        for (lane, receiver) in &mut self.receivers {
            jobs.push(Box::new(move |abort| receiver.run(lane, &late, Until::Settled(missing), abort)));
        }
        together(jobs)?;
        Ok(self.judge())
    }

    fn check(&self, transfer: &Transfer) -> Result<(), Fault> {
        let rooms = self.transmitters.iter().map(|(_, transmitter)| transmitter.buffers.room as usize - HEADER);
        let (size, most) = (transfer.frame_size, rooms.min().unwrap_or(usize::MAX));
        if !(LEAST..=most).contains(&(size as usize)) {
            return Err(Fault(format!("frames of {size} bytes are not allowed: {LEAST} to {most}")));
        }
        if transfer.burst == 0 {
            return Err(Fault("bursts of no frames lead nowhere".into()));
        }
        Ok(())
    }

    fn judge(&mut self) -> Verdict {
        let mut seen = Seen::default();
        for (_, receiver) in &mut self.receivers {
            seen.add(std::mem::take(&mut receiver.seen));
        }
        for (_, transmitter) in &mut self.transmitters {
            seen.expect(transmitter.stream, transmitter.first..transmitter.next);
            transmitter.first = transmitter.next;
        }
        let firsts: Vec<_> = self.transmitters.iter().map(|(_, transmitter)| transmitter.first).collect();
        self.receivers.iter_mut().for_each(|(_, receiver)| receiver.firsts.clone_from(&firsts));
        if self.receivers.is_empty() {
            Verdict::default() // what has become of them cannot be known
        } else {
            seen.verdict()
        }
    }
}

/// Guest memory for what the slots of a queue hold: a header and a frame each.
struct Buffers {
    memory: GuestMemory,
    start: u64,
    room: u32,
}

impl Buffers {
    fn new(memory: &GuestMemory, setup: &QueueSetup, room: u32) -> Result<Self, Fault> {
        memory.check(setup.buffers, u64::from(setup.ring.size) * u64::from(room))?;
        Ok(Self { memory: memory.clone(), start: setup.buffers, room })
    }

    fn at(&self, slot: u16) -> u64 {
        self.start + u64::from(slot) * u64::from(self.room)
    }
}

struct Transmitter {
    buffers: Buffers,
    stream: u16,
    /// Sequence numbers: of the first frame since the last verdict, and of the next.
    first: u64,
    next: u64,
    scratch: Vec<u8>,
}

impl Transmitter {
    fn run(&mut self, lane: &mut Lane, transfer: &Transfer, abort: &AtomicBool) -> Result<Traffic, Fault> {
        for slot in 0..lane.slots() {
            self.buffers.memory.write(self.buffers.at(slot), &[0; HEADER])?;
            self.write(slot, transfer.frame_size)?;
        }
        let Transfer { burst, time, poll, .. } = *transfer;
        let pace = Pace { begin: Instant::now(), time, burst, poll, abort };
        let mut work = Sending { transmitter: self, transfer, sent: Count::default() };
        let signals = lane.run(&mut work, &pace)?;
        Ok(Traffic { sent: work.sent, signals, ..Traffic::default() })
    }

    /// Put the next frame of the stream behind the header of a slot.
    fn write(&mut self, slot: u16, frame_size: u32) -> Result<(), Fault> {
        let frame = &mut self.scratch[..frame_size as usize];
        frame::write(frame, self.stream, self.next);
        Ok(self.buffers.memory.write(self.buffers.at(slot) + HEADER as u64, frame)?)
    }
}

struct Sending<'a> {
    transmitter: &'a mut Transmitter,
    transfer: &'a Transfer,
    sent: Count,
}

impl Work for Sending<'_> {
    /// As Linux does: nobody waits for a frame that is sent, only for room.
    fn worth_waking(&self, in_flight: u16) -> u16 {
        (in_flight / 4 * 3).max(1)
    }

    fn wants(&self, _: u16, now: Duration) -> bool {
        // One at least, however late it has become: the figures are divided by them.
        self.sent.frames == 0 || now < self.transfer.time
    }

    fn offer(&mut self, ring: &mut Ring, slot: u16, _: Duration) -> Result<(), Fault> {
        let (transmitter, size) = (&mut *self.transmitter, self.transfer.frame_size);
        if self.transfer.verify {
            transmitter.write(slot, size)?;
            transmitter.next += 1;
        }
        ring.offer(slot, &[Desc::readable(transmitter.buffers.at(slot), HEADER as u32 + size)]);
        self.sent.one(size as usize);
        Ok(())
    }

    fn reap(&mut self, _: u16, _: u32, _: Duration) -> Result<(), Fault> {
        Ok(())
    }

    fn is_over(&self, in_flight: u16, _: Duration) -> bool {
        in_flight == 0
    }
}

struct Receiver {
    buffers: Buffers,
    /// By stream of ours: what has a lower number was sent before the last verdict.
    firsts: Vec<u64>,
    seen: Seen,
    scratch: Vec<u8>,
}

impl Receiver {
    fn run(
        &mut self,
        lane: &mut Lane,
        transfer: &Transfer,
        until: Until<'_>,
        abort: &AtomicBool,
    ) -> Result<Traffic, Fault> {
        let Transfer { burst, time, poll, .. } = *transfer;
        let pace = Pace { begin: Instant::now(), time, burst, poll, abort };
        let (last, received) = (Duration::ZERO, Count::default());
        let mut work = Receiving { receiver: self, transfer, until, last, received };
        let signals = lane.run(&mut work, &pace)?;
        Ok(Traffic { received: work.received, signals, ..Traffic::default() })
    }

    /// What came in a slot.
    fn read(&mut self, slot: u16, length: usize) -> Result<Content, Fault> {
        let frame = &mut self.scratch[..length];
        self.buffers.memory.read(self.buffers.at(slot) + HEADER as u64, frame)?;
        Ok(frame::read(frame))
    }

    /// Whether it may be one of those that were sent since the last verdict.
    fn is_ours(&self, content: &Content) -> bool {
        match *content {
            Content::Foreign => false,
            Content::Damaged => true,
            Content::Intact { stream, sequence } => {
                self.firsts.get(usize::from(stream)).is_some_and(|first| sequence >= *first)
            }
        }
    }

    fn count(&mut self, content: &Content) {
        match *content {
            Content::Damaged => self.seen.damaged(),
            Content::Intact { stream, sequence }
                if self.is_ours(content) || usize::from(stream) >= self.firsts.len() =>
            {
                self.seen.saw(stream, sequence);
            }
            Content::Foreign | Content::Intact { .. } => self.seen.foreign(),
        }
    }
}

/// When it is enough.
#[derive(Clone, Copy)]
enum Until<'a> {
    /// The time is over, so many transmitters are not done, and a frame has come to any queue.
    Sent(&'a AtomicUsize, &'a AtomicBool),
    /// So many of our frames are missing, and will not come any more if none has come for a while.
    Settled(&'a AtomicI64),
}

struct Receiving<'a> {
    receiver: &'a mut Receiver,
    transfer: &'a Transfer,
    until: Until<'a>,
    /// When one of our frames came.
    last: Duration,
    received: Count,
}

impl Work for Receiving<'_> {
    /// Nothing may come.
    const PATIENCE: Duration = Duration::MAX;

    fn wants(&self, _: u16, _: Duration) -> bool {
        true
    }

    fn offer(&mut self, ring: &mut Ring, slot: u16, _: Duration) -> Result<(), Fault> {
        let buffers = &self.receiver.buffers;
        ring.offer(slot, &[Desc::writable(buffers.at(slot), buffers.room)]);
        Ok(())
    }

    fn reap(&mut self, slot: u16, length: u32, now: Duration) -> Result<(), Fault> {
        let room = self.receiver.buffers.room;
        let frame = (length as usize).checked_sub(HEADER).filter(|_| length <= room);
        let Some(frame) = frame else {
            return Err(Fault(format!("a frame came with {length} bytes in a buffer of {room}")));
        };
        if let (Until::Sent(_, came), 0) = (self.until, self.received.frames) {
            came.store(true, Ordering::Relaxed);
        }
        self.received.one(frame);
        if !self.transfer.verify {
            return Ok(());
        }
        let content = self.receiver.read(slot, frame)?;
        match self.until {
            Until::Sent(..) => self.receiver.count(&content),
            Until::Settled(missing) if self.receiver.is_ours(&content) => {
                self.receiver.count(&content);
                missing.fetch_sub(1, Ordering::Relaxed);
                self.last = now;
            }
            // A source goes on when the run is over, and what it sends then is nobody's business.
            Until::Settled(_) => (),
        }
        Ok(())
    }

    fn is_over(&self, _: u16, now: Duration) -> bool {
        match self.until {
            Until::Sent(sending, came) => {
                // One frame at least, however late it has become, if there are any.
                let is_enough = came.load(Ordering::Relaxed) || now >= self.transfer.time + SILENCE;
                now >= self.transfer.time && sending.load(Ordering::Relaxed) == 0 && is_enough
            }
            Until::Settled(missing) => {
                missing.load(Ordering::Relaxed) <= 0 || now >= self.last + QUIET || now >= LATEST
            }
        }
    }
}
