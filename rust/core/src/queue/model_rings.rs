//! Both rings of the model, each with the driver's half as Linux has it. The device's half is the production code.

use loom::sync::atomic::AtomicU32;
use loom::sync::Arc;

use super::laps::{self, Laps, PackedCells, Place};
use super::notify::{Cells, Indexes, NO_INTERRUPT, NO_NOTIFY};
use crate::sync::{fence, AtomicU16, AtomicU64, Ordering};

const SIZE: u16 = 4;

/// What a scenario is tried with.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    pub packed: bool,
    pub event_idx: bool,
}

impl Kind {
    /// A ring whose driver wants no interrupt until it waits for one.
    pub fn ring_and_driver(self) -> (Ring, Driver) {
        let event_idx = self.event_idx;
        if self.packed {
            let words = Arc::new(Packed::default());
            words.driver_event.store(laps::DISABLE, Ordering::Relaxed);
            let laps = Laps::new(words.clone(), SIZE, event_idx, false, 0, 0);
            (Ring::Packed(laps), Driver::Packed { words, event_idx, added: 0 })
        } else {
            let words = Arc::new(Split::default());
            words.avail_flags.store(NO_INTERRUPT, Ordering::Relaxed);
            let indexes = Indexes::new(words.clone(), SIZE, event_idx, false, 0, 0);
            (Ring::Split(indexes), Driver::Split { words, event_idx, added: 0 })
        }
    }
}

/// The words of a split ring without its entries.
#[derive(Default)]
pub struct Split {
    avail_idx: AtomicU16,
    avail_flags: AtomicU16,
    used_event: AtomicU16,
    avail_event: AtomicU16,
    used_flags: AtomicU16,
    used_idx: AtomicU16,
}

impl Cells for Arc<Split> {
    fn avail_idx(&self) -> u16 {
        self.avail_idx.load(Ordering::Acquire)
    }

    fn avail_flags(&self) -> u16 {
        self.avail_flags.load(Ordering::Relaxed)
    }

    fn used_event(&self) -> u16 {
        self.used_event.load(Ordering::Relaxed)
    }

    fn set_avail_event(&self, index: u16) {
        self.avail_event.store(index, Ordering::Relaxed);
    }

    fn set_used_flags(&self, flags: u16) {
        self.used_flags.store(flags, Ordering::Relaxed);
    }

    fn set_used_idx(&self, index: u16) {
        self.used_idx.store(index, Ordering::Release);
    }
}

/// The words of a packed ring without the addresses.
#[derive(Default)]
pub struct Packed {
    words: [AtomicU64; SIZE as usize],
    driver_event: AtomicU32,
    device_event: AtomicU32,
}

impl PackedCells for Arc<Packed> {
    fn word(&self, index: u16) -> u64 {
        self.words[usize::from(index)].load(Ordering::Acquire)
    }

    fn set_word(&self, index: u16, word: u64) {
        self.words[usize::from(index)].store(word, Ordering::Relaxed);
    }

    fn publish_word(&self, index: u16, word: u64) {
        self.words[usize::from(index)].store(word, Ordering::Release);
    }

    fn driver_event(&self) -> u32 {
        self.driver_event.load(Ordering::Relaxed)
    }

    fn set_device_event(&self, event: u32) {
        self.device_event.store(event, Ordering::Relaxed);
    }
}

/// The device's half.
pub enum Ring {
    Split(Indexes<Arc<Split>>),
    Packed(Laps<Arc<Packed>>),
}

impl Ring {
    pub fn suppress(&mut self) {
        match self {
            Self::Split(indexes) => indexes.suppress(),
            Self::Packed(laps) => laps.suppress(),
        }
    }

    pub fn look(&mut self) -> bool {
        match self {
            Self::Split(indexes) => indexes.look().unwrap(),
            Self::Packed(laps) => laps.look().unwrap(),
        }
    }

    /// Take every chain and write its used entry.
    pub fn complete_all(&mut self) {
        match self {
            Self::Split(indexes) => {
                while indexes.take(true).unwrap().is_some() {
                    indexes.next_used = indexes.next_used.wrapping_add(1);
                }
            }
            Self::Packed(laps) => {
                while laps.next(true).unwrap().is_some() {
                    laps.taken(1).unwrap();
                    laps.put(0, 1, 0, true);
                }
            }
        }
    }

    pub fn publish(&mut self) -> Option<bool> {
        match self {
            Self::Split(indexes) => indexes.publish(true),
            Self::Packed(laps) => laps.publish(),
        }
    }

    pub fn rearm(&mut self) -> bool {
        match self {
            Self::Split(indexes) => indexes.rearm(),
            Self::Packed(laps) => laps.rearm(),
        }
    }

    pub fn has_news(&self) -> bool {
        match self {
            Self::Split(indexes) => indexes.has_news(),
            Self::Packed(laps) => laps.has_news(),
        }
    }

    /// How many chains were taken; a scenario adds less than two laps of them.
    pub fn served(&self) -> u16 {
        match self {
            Self::Split(indexes) => indexes.next_avail,
            Self::Packed(laps) => laps.next_avail as u16,
        }
    }
}

/// The driver's half.
pub enum Driver {
    Split { words: Arc<Split>, event_idx: bool, added: u16 },
    Packed { words: Arc<Packed>, event_idx: bool, added: u16 },
}

impl Driver {
    pub fn added(&self) -> u16 {
        match self {
            Self::Split { added, .. } | Self::Packed { added, .. } => *added,
        }
    }

    /// Make one chain available and kick if the device asks for it.
    pub fn add(&mut self, kick: impl FnOnce()) {
        let wanted = match self {
            Self::Split { words, event_idx, added } => {
                *added += 1;
                words.avail_idx.store(*added, Ordering::Release);
                fence(Ordering::SeqCst);
                if *event_idx {
                    words.avail_event.load(Ordering::Relaxed) == *added - 1
                } else {
                    words.used_flags.load(Ordering::Relaxed) & NO_NOTIFY == 0
                }
            }
            Self::Packed { words, added, .. } => {
                let flags = if *added < SIZE { laps::AVAIL } else { laps::USED };
                words.publish_word(*added % SIZE, u64::from(flags) << 48);
                *added += 1;
                fence(Ordering::SeqCst);
                match words.device_event.load(Ordering::Relaxed) {
                    laps::ENABLE => true,
                    laps::DISABLE => false,
                    event => event == laps::DESC | encoded(*added - 1),
                }
            }
        };
        if wanted {
            kick();
        }
    }

    /// How many of the first lap's chains the driver sees used.
    pub fn used(&self) -> u16 {
        match self {
            Self::Split { words, .. } => words.used_idx.load(Ordering::Acquire),
            Self::Packed { words, .. } => {
                let is_used = |index: &u16| words.word(*index) >> 48 & u64::from(laps::USED) != 0;
                (0..SIZE).take_while(is_used).count() as u16
            }
        }
    }

    /// Ask for an interrupt at the next used entry; return how many there are already.
    pub fn await_used(&self, seen: u16) -> u16 {
        match self {
            Self::Split { words, event_idx: true, .. } => words.used_event.store(seen, Ordering::Relaxed),
            Self::Split { words, .. } => words.avail_flags.store(0, Ordering::Relaxed),
            Self::Packed { words, event_idx: true, .. } => {
                words.driver_event.store(laps::DESC | encoded(seen), Ordering::Relaxed);
            }
            Self::Packed { words, .. } => words.driver_event.store(laps::ENABLE, Ordering::Relaxed),
        }
        fence(Ordering::SeqCst);
        self.used()
    }
}

/// Index and wrap counter of the n-th descriptor.
fn encoded(n: u16) -> u32 {
    let place = Place::from(n);
    if n < SIZE {
        place | 1 << 15
    } else {
        place - Place::from(SIZE)
    }
}
