//! A driver of one queue: it writes what it is told to, right or wrong.

use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex};

use pyvirtio_core::interrupt::{EventLine, ISR_CONFIG, ISR_QUEUE};
use pyvirtio_core::sync::EventFd;
use pyvirtio_core::{
    Chain, DeviceState, GuestMemory, Handler, Interrupt, IrqLine, Isr, MsixVector, RingConfig, VirtQueue,
};

pub const SIZE: u16 = 8;
pub const DESC: u64 = 0x1000;
pub const AVAIL: u64 = 0x2000;
pub const USED: u64 = 0x3000;
pub const TABLE: u64 = 0x4000;
pub const BUFFERS: u64 = 0x10000;
/// RAM is [0, 1 MiB) and, adjacent, [1 MiB, 2 MiB); then nothing.
pub const BORDER: u64 = 0x10_0000;
pub const END: u64 = 0x20_0000;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

pub struct Closure<F>(pub F);

impl<F: Fn(&Arc<VirtQueue>) + Send + Sync> Handler for Closure<F> {
    fn handle(&self, vq: &Arc<VirtQueue>) {
        self.0(vq);
    }
}

pub fn ram() -> GuestMemory {
    GuestMemory::allocate(&[(0, BORDER), (BORDER, END - BORDER)]).unwrap()
}

pub struct Driver {
    pub memory: GuestMemory,
    pub state: Arc<DeviceState>,
    pub vq: Arc<VirtQueue>,
    pub vector: Arc<MsixVector>,
    pub config_vector: Arc<MsixVector>,
    pub reasons: Arc<Mutex<Vec<String>>>,
    pub config: RingConfig,
    pub avail_idx: u16,
    seen: u16,
}

impl Driver {
    pub fn new() -> Self {
        let reasons = Arc::new(Mutex::new(Vec::new()));
        let heard = reasons.clone();
        let on_broken = Box::new(move |reason: &str| heard.lock().unwrap().push(reason.to_owned()));
        let state = Arc::new(DeviceState::new("dev0".into(), on_broken));
        let line = Arc::new(IrqLine::new(Arc::new(EventLine { rose: EventFd::new().unwrap() })));
        let isr = Arc::new(Isr::new(line));
        let vector = Arc::new(MsixVector::new().unwrap());
        let config_vector = Arc::new(MsixVector::new().unwrap());
        let vq = Arc::new(VirtQueue::new(state.clone(), "requestq".into(), 0, 256).unwrap());
        vq.set_interrupt(Some(Interrupt::Pci { isr: isr.clone(), bits: ISR_QUEUE, vector: Some(vector.clone()) }));
        let config_interrupt = Interrupt::Pci { isr, bits: ISR_CONFIG, vector: Some(config_vector.clone()) };
        state.set_config_interrupt(Some(config_interrupt));
        state.set_driver_ok(true);
        let config =
            RingConfig { size: SIZE, desc: DESC, avail: AVAIL, used: USED, indirect: true, ..RingConfig::default() };
        Self { memory: ram(), state, vq, vector, config_vector, reasons, config, avail_idx: 0, seen: 0 }
    }

    pub fn with(config: impl FnOnce(&mut RingConfig)) -> Self {
        let mut driver = Self::new();
        config(&mut driver.config);
        (driver.avail_idx, driver.seen) = (driver.config.next_avail, driver.config.next_used);
        driver.store(AVAIL + 2, driver.avail_idx);
        driver.store(USED + 2, driver.seen);
        driver
    }

    /// The same driver and its memory, with a device that knows nothing of what was before.
    pub fn with_a_new_device(&self) -> Self {
        let mut driver = Self::new();
        (driver.memory, driver.config) = (self.memory.clone(), self.config.clone());
        driver.config.next_used = driver.load(USED + 2);
        (driver.avail_idx, driver.seen) = (self.avail_idx, self.seen);
        driver
    }

    pub fn start(&self, handler: impl Fn(&Arc<VirtQueue>) + Send + Sync + 'static) {
        self.vq.start(self.memory.clone(), &self.config, Arc::new(Closure(handler))).unwrap();
    }

    /// Start with a handler that completes each chain without writing.
    pub fn start_completing(&self) {
        self.start(|vq| {
            while let Some(mut chain) = vq.pop() {
                chain.complete().unwrap();
            }
        });
    }

    /// Start with a handler that leaves the chains where they are, and pop one as another thread would.
    pub fn pop(&self) -> Option<Chain> {
        if self.vq.size() == 0 {
            self.start(|_| ());
        }
        self.vq.pop()
    }

    pub fn store(&self, address: u64, value: u16) {
        self.memory.atomic16(address).unwrap().store(value, SeqCst);
    }

    pub fn load(&self, address: u64) -> u16 {
        self.memory.atomic16(address).unwrap().load(SeqCst)
    }

    pub fn desc(&self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        self.desc_in(DESC, index, address, length, flags, next);
    }

    pub fn desc_in(&self, table: u64, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(length.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.memory.write(table + 16 * u64::from(index), &bytes).unwrap();
    }

    /// Make a head available, without a kick.
    pub fn make_available(&mut self, head: u16) {
        self.store(AVAIL + 4 + 2 * u64::from(self.avail_idx % self.config.size), head);
        self.avail_idx = self.avail_idx.wrapping_add(1);
        self.store(AVAIL + 2, self.avail_idx);
    }

    /// Make one writable buffer of 16 bytes available, at descriptor `head`.
    pub fn add(&mut self, head: u16) {
        self.desc(head, BUFFERS + 16 * u64::from(head), 16, WRITE, 0);
        self.make_available(head);
    }

    /// The used entries since the last call: (head, length).
    pub fn used(&mut self) -> Vec<(u32, u32)> {
        let mut used = Vec::new();
        while self.seen != self.load(USED + 2) {
            let at = USED + 4 + 8 * u64::from(self.seen % self.config.size);
            let word = |at| self.memory.atomic32(at).unwrap().load(SeqCst);
            used.push((word(at), word(at + 4)));
            self.seen = self.seen.wrapping_add(1);
        }
        used
    }

    /// Interrupts of the queue since the last call.
    pub fn interrupts(&self) -> u64 {
        self.vector.irqfd.take()
    }

    pub fn broken(&self) -> String {
        self.state.broken().unwrap_or_default()
    }
}
