//! The front-end of rust-vmm's `vhost` crate against a served disk: `vhost_front_end SOCKET`.
//!
//! Agrees on all that both know, writes a sector, flushes, reads it back, on a ring that it writes by hand. What goes
//! wrong ends it with a message.

use std::error::Error;
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering::SeqCst;

use pyvirtio_core::GuestMemory;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

type Outcome<T> = Result<T, Box<dyn Error>>;

const SIZE: u16 = 8;
const RAM: u64 = 1 << 20;
const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const HEADER: u64 = 0x4000;
const DATA: u64 = 0x5000;
const STATUS: u64 = 0x6000;
const SECTOR: u64 = 3;
const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;
const VHOST_USER_F_PROTOCOL_FEATURES: u64 = 1 << 30;
const CAPACITY_BYTES: u32 = 8;
const HANG_MS: i32 = 10_000;

struct Driver {
    front_end: Frontend,
    memory: GuestMemory,
    kick: EventFd,
    call: EventFd,
    requests: u16,
}

impl Driver {
    fn connect(path: &str) -> Outcome<Self> {
        let mut front_end = Frontend::connect(path, 1)?;
        front_end.set_owner()?;
        let features = front_end.get_features()?;
        assert_ne!(features & VHOST_USER_F_PROTOCOL_FEATURES, 0);
        front_end.set_features(features)?;
        let protocol = front_end.get_protocol_features()?;
        front_end.set_protocol_features(protocol)?;
        front_end.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        assert!(front_end.get_queue_num()? >= 1);
        let memory = GuestMemory::allocate(&[(0, RAM)])?;
        let (kick, call) = (EventFd::new(0)?, EventFd::new(0)?);
        Ok(Self { front_end, memory, kick, call, requests: 0 })
    }

    fn capacity(&mut self) -> Outcome<u64> {
        let empty = [0; CAPACITY_BYTES as usize];
        let (_, payload) = self.front_end.get_config(0, CAPACITY_BYTES, VhostUserConfigFlags::WRITABLE, &empty)?;
        Ok(u64::from_le_bytes(payload.as_slice().try_into()?))
    }

    fn start(&mut self) -> Outcome<()> {
        let region = self.memory.regions().next().ok_or("no memory")?;
        let user = region.host as u64;
        let info = VhostUserMemoryRegionInfo {
            guest_phys_addr: region.address,
            memory_size: region.size,
            userspace_addr: user,
            mmap_offset: region.offset,
            mmap_handle: region.fd,
        };
        let front_end = &mut self.front_end;
        front_end.set_mem_table(&[info])?;
        let wanted = VhostUserInflight { num_queues: 1, queue_size: SIZE, ..VhostUserInflight::default() };
        let (inflight, file) = front_end.get_inflight_fd(&wanted)?;
        front_end.set_inflight_fd(&inflight, file.as_raw_fd())?;
        front_end.set_vring_num(0, SIZE)?;
        front_end.set_vring_base(0, 0)?;
        let addresses = VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: 0,
            desc_table_addr: user + DESC,
            used_ring_addr: user + USED,
            avail_ring_addr: user + AVAIL,
            log_addr: None,
        };
        front_end.set_vring_addr(0, &addresses)?;
        front_end.set_vring_call(0, &self.call)?;
        front_end.set_vring_kick(0, &self.kick)?;
        front_end.set_vring_enable(0, true)?;
        Ok(())
    }

    /// Three descriptors: header, data, status. The data is read by the device for a write, and written for a read.
    fn request(&mut self, kind: u32, data: u32) -> Outcome<()> {
        let header = u128::from(kind) | u128::from(SECTOR) << 64;
        self.memory.write(HEADER, &header.to_le_bytes())?;
        self.memory.write(STATUS, &[0xff])?;
        let writable = if kind == READ { 2 } else { 0 };
        self.desc(0, HEADER, 16, 1, if data > 0 { 1 } else { 2 })?;
        self.desc(1, DATA, data, 1 | writable, 2)?;
        self.desc(2, STATUS, 1, 2, 0)?;
        // With EVENT_IDX, which was agreed on: interrupt for this one.
        self.memory.atomic16(AVAIL + 4 + 2 * u64::from(SIZE))?.store(self.requests, SeqCst);
        self.memory.atomic16(AVAIL + 4 + 2 * u64::from(self.requests % SIZE))?.store(0, SeqCst);
        self.requests += 1;
        self.memory.atomic16(AVAIL + 2)?.store(self.requests, SeqCst);
        self.kick.write(1)?;
        self.wait_for_interrupt()?;
        assert_eq!(self.memory.atomic16(USED + 2)?.load(SeqCst), self.requests);
        let mut status = [0xff];
        self.memory.read(STATUS, &mut status)?;
        assert_eq!(status, [0]);
        Ok(())
    }

    /// The back-end has made the eventfd non-blocking.
    fn wait_for_interrupt(&self) -> Outcome<()> {
        let mut poll = libc::pollfd { fd: self.call.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd of ours, for the time of the call.
        let ready = unsafe { libc::poll(&mut poll, 1, HANG_MS) };
        if ready != 1 {
            return Err("no interrupt".into());
        }
        self.call.read()?;
        Ok(())
    }

    fn desc(&self, index: u64, address: u64, length: u32, flags: u16, next: u16) -> Outcome<()> {
        let word = u128::from(address) | u128::from(length) << 64 | u128::from(flags) << 96 | u128::from(next) << 112;
        Ok(self.memory.write(DESC + 16 * index, &word.to_le_bytes())?)
    }
}

fn main() -> Outcome<()> {
    let path = std::env::args().nth(1).ok_or("usage: vhost_front_end SOCKET")?;
    let mut driver = Driver::connect(&path)?;
    assert!(driver.capacity()? > SECTOR);
    driver.start()?;
    let text = [b'v'; 512];
    driver.memory.write(DATA, &text)?;
    driver.request(WRITE, 512)?;
    driver.request(FLUSH, 0)?;
    driver.memory.write(DATA, &[0; 512])?;
    driver.request(READ, 512)?;
    let mut back = [0; 512];
    driver.memory.read(DATA, &mut back)?;
    assert_eq!(back, text);
    assert_eq!(driver.front_end.get_vring_base(0)?, 3);
    println!("served");
    Ok(())
}
