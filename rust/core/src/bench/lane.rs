//! A queue in a driver's hands: it is filled and reaped, kicked, and waited for; what for is somebody else's business.

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::ring::Ring;
use super::{Alarms, Fault, QueueSetup};
use crate::memory::GuestMemory;

/// Looks at the used ring between two looks at the clock.
const LOOKS: u32 = 1000;
/// How long a sleep lasts at most before it is looked whether the run was aborted.
const LONGEST_NAP: Duration = Duration::from_millis(100);
const SHORTEST_NAP: Duration = Duration::from_millis(1);
/// Silence after which it pays to ask the kernel what is wrong.
const SLOW: Duration = Duration::from_millis(10);

/// What the slots of a queue are for. Times are those since the begin of the run.
pub trait Work {
    /// A back-end that gives nothing back for so long does not work.
    const PATIENCE: Duration = Duration::from_secs(10);

    /// How many have to come back until it pays to wake up, with so many in flight.
    fn worth_waking(&self, _in_flight: u16) -> u16 {
        1
    }

    /// Whether to offer one more, with so many in flight.
    fn wants(&self, in_flight: u16, now: Duration) -> bool;

    /// Put what a slot is for into the ring.
    fn offer(&mut self, ring: &mut Ring, slot: u16, now: Duration) -> Result<(), Fault>;

    /// A slot came back, with `length` bytes written.
    fn reap(&mut self, slot: u16, length: u32, now: Duration) -> Result<(), Fault>;

    fn is_over(&self, in_flight: u16, now: Duration) -> bool;
}

/// How a queue is driven.
pub struct Pace<'a> {
    pub begin: Instant,
    /// How long the run is to take; near its end nobody sleeps for long.
    pub time: Duration,
    /// Slots that are offered before the device is told, at most.
    pub burst: u16,
    /// Look at the used ring all the time; else sleep until the back-end interrupts.
    pub poll: bool,
    pub abort: &'a AtomicBool,
}

impl Pace<'_> {
    fn now(&self) -> Duration {
        self.begin.elapsed()
    }

    fn nap(&self) -> Duration {
        self.time.saturating_sub(self.now()).clamp(SHORTEST_NAP, LONGEST_NAP)
    }
}

/// What was signalled in a run.
#[derive(Debug, Default, Clone, Copy)]
pub struct Signals {
    pub kicks: u64,
    pub interrupts: u64,
}

impl Signals {
    pub fn add(&mut self, other: Self) {
        self.kicks += other.kicks;
        self.interrupts += other.interrupts;
    }
}

pub struct Lane {
    ring: Ring,
    kick: RawFd,
    call: RawFd,
    alarms: Alarms,
    /// The slots that the device does not have; the last is used next, so that few are used when few are in flight.
    free: Vec<u16>,
    lent: Vec<bool>,
}

impl Lane {
    /// Each of `slots` takes `per_slot` descriptors of the ring.
    pub fn new(memory: &GuestMemory, setup: &QueueSetup, slots: u16, per_slot: u16) -> Result<Self, Fault> {
        let size = setup.ring.size;
        if slots == 0 || slots.saturating_mul(per_slot) > size {
            return Err(Fault(format!("{slots} times {per_slot} do not fit a ring of {size} descriptors")));
        }
        Ok(Self {
            ring: Ring::new(memory.clone(), &setup.ring, per_slot)?,
            kick: setup.kick,
            call: setup.call,
            alarms: setup.alarms,
            free: (0..slots).rev().collect(),
            lent: vec![false; slots.into()],
        })
    }

    pub fn slots(&self) -> u16 {
        self.lent.len() as u16
    }

    fn in_flight(&self) -> u16 {
        self.slots() - self.free.len() as u16
    }

    /// Offer and reap until the work is over.
    pub fn run<W: Work>(&mut self, work: &mut W, pace: &Pace<'_>) -> Result<Signals, Fault> {
        let (mut signals, mut last) = (Signals::default(), pace.now());
        self.ring.set_interrupts((!pace.poll).then_some(1));
        loop {
            let goes_on = self.offer(work, pace)?;
            if self.ring.publish() {
                signals.kicks += 1;
                signal(self.kick);
            }
            if work.is_over(self.in_flight(), pace.now()) || pace.abort.load(Ordering::Relaxed) {
                return Ok(signals);
            }
            let used = if goes_on { self.used()? } else { self.look(work, pace, &mut signals)? };
            let now = pace.now();
            if used > 0 {
                last = now;
                self.reap(work, used, now)?;
            } else {
                self.check::<W>(now - last)?;
            }
        }
    }

    /// Offer a burst; whether there may be more to be offered at once.
    fn offer(&mut self, work: &mut impl Work, pace: &Pace<'_>) -> Result<bool, Fault> {
        let now = pace.now();
        for _ in 0..pace.burst {
            if !work.wants(self.in_flight(), now) {
                return Ok(false);
            }
            let Some(slot) = self.free.pop() else { return Ok(false) };
            work.offer(&mut self.ring, slot, now)?;
            self.lent[usize::from(slot)] = true;
        }
        Ok(true)
    }

    /// How many the device has given back.
    fn used(&self) -> Result<u16, Fault> {
        let (used, in_flight) = (self.ring.used(), self.in_flight());
        if used > in_flight {
            return Err(Fault(format!("{used} were given back, and {in_flight} were in flight")));
        }
        Ok(used)
    }

    /// Look for a while, or sleep until there is an interrupt.
    fn look(&self, work: &impl Work, pace: &Pace<'_>, signals: &mut Signals) -> Result<u16, Fault> {
        if pace.poll {
            for _ in 0..LOOKS {
                if self.ring.used() > 0 {
                    break;
                }
                std::hint::spin_loop();
            }
            return self.used();
        }
        let enough = work.worth_waking(self.in_flight());
        self.ring.set_interrupts(Some(enough));
        if self.ring.used() < enough && self.alarms.sleep(self.call, pace.nap()) {
            signals.interrupts += 1;
        }
        self.used()
    }

    fn reap(&mut self, work: &mut impl Work, used: u16, now: Duration) -> Result<(), Fault> {
        for _ in 0..used {
            let popped = self.ring.pop().filter(|(slot, _)| self.lent.get(usize::from(*slot)) == Some(&true));
            let Some((slot, length)) = popped else {
                return Err(Fault("something was given back that was not in flight".into()));
            };
            self.lent[usize::from(slot)] = false;
            self.free.push(slot);
            work.reap(slot, length, now)?;
        }
        Ok(())
    }

    /// Nothing has come back for so long.
    fn check<W: Work>(&self, silence: Duration) -> Result<(), Fault> {
        if silence > W::PATIENCE {
            let (in_flight, seconds) = (self.in_flight(), W::PATIENCE.as_secs());
            return Err(Fault(format!("none of {in_flight} in flight was given back for {seconds} s")));
        }
        if silence > SLOW {
            self.alarms.check()?;
        }
        Ok(())
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
    fn sleep(&self, call: RawFd, nap: Duration) -> bool {
        let [connection, err] = self.polled();
        let mut fds = [libc::pollfd { fd: call, events: libc::POLLIN, revents: 0 }, connection, err];
        // SAFETY: three valid entries.
        let ready = unsafe { libc::poll(fds.as_mut_ptr(), 3, nap.as_millis() as i32) };
        if ready <= 0 || fds[0].revents == 0 {
            return false;
        }
        let mut count = [0u8; 8];
        // SAFETY: reads into 8 bytes of ours.
        unsafe { libc::read(call, count.as_mut_ptr().cast(), count.len()) == 8 }
    }
}
