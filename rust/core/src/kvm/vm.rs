//! A virtual machine: memory slots, interrupt controllers, ioeventfds, irqfds and MSI routes.

use std::ffi::CStr;
use std::mem::ManuallyDrop;
use std::os::fd::{FromRawFd, RawFd};
use std::sync::{Arc, Mutex, RwLock, Weak};

use kvm_bindings::{
    kvm_ioeventfd, kvm_ioeventfd_flag_nr_datamatch, kvm_ioeventfd_flag_nr_deassign, kvm_ioeventfd_flag_nr_pio,
    kvm_irq_routing_entry, kvm_pit_config, kvm_userspace_memory_region, KvmIrqRouting, KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_MEM_READONLY,
    KVM_PIT_SPEAKER_DUMMY,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::state::{self, ChipState};
use super::{During, Error, Result, Sections, Serial, Vcpu};
use crate::interrupt::Line;
use crate::memory::GuestMemory;

vmm_sys_util::ioctl_iow_nr!(KVM_IOEVENTFD, kvm_bindings::KVMIO, 0x79, kvm_ioeventfd);

/// Four pages below the local APIC that KVM uses on Intel CPUs; no guest RAM or BAR lies there.
const IDENTITY_MAP: u64 = 0xfeff_c000;
const TSS: usize = 0xfeff_d000;

const PIC_PINS: u32 = 16;
const IOAPIC_PINS: u32 = 24;
const PAGE: usize = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    Pio,
    Mmio,
}

/// What an ioeventfd matches: `length` 0 matches any width, `datamatch` None any value.
#[derive(Clone, Copy, Debug)]
pub struct IoAddress {
    pub space: Space,
    pub address: u64,
    pub length: u32,
    pub datamatch: Option<u64>,
}

/// An MSI message that an irqfd on `gsi` sends.
#[derive(Clone, Copy, Debug)]
pub struct MsiRoute {
    pub gsi: u32,
    pub address: u64,
    pub data: u32,
}

/// The memory slots, with what keeps their host memory mapped.
#[derive(Default)]
struct Slots {
    count: u32,
    memory: Option<GuestMemory>,
    roms: Vec<Rom>,
}

pub struct Vm {
    pub(super) kvm: Kvm,
    pub(super) fd: VmFd,
    slots: Mutex<Slots>,
    serials: RwLock<Vec<(u16, Arc<Serial>)>>,
    /// What `reset` puts back; an error if this KVM cannot say it all.
    initial: Mutex<Option<Result<ChipState>>>,
}

impl Vm {
    pub fn new(device: &CStr) -> Result<Arc<Vm>> {
        let kvm = Kvm::new_with_path(device).during("open")?;
        let fd = kvm.create_vm().during("KVM_CREATE_VM")?;
        Ok(Arc::new(Vm { kvm, fd, slots: Mutex::default(), serials: RwLock::default(), initial: Mutex::default() }))
    }

    /// Give the guest its RAM, once.
    pub fn set_memory(&self, memory: &GuestMemory) -> Result<()> {
        let mut slots = self.slots.lock().unwrap();
        for region in memory.regions() {
            // SAFETY: the region is mapped for as long as `slots.memory` lives, which is as long as the VM.
            unsafe { self.add_slot(&mut slots, region.address, region.host as u64, region.size, 0)? };
        }
        slots.memory = Some(memory.clone());
        Ok(())
    }

    pub fn memory(&self) -> Option<GuestMemory> {
        self.slots.lock().unwrap().memory.clone()
    }

    /// Put `data` at `address` (both whole pages); the guest's writes to it become MMIO exits.
    ///
    /// A KVM without read-only slots gets ordinary RAM there.
    pub fn add_rom(&self, address: u64, data: &[u8]) -> Result<()> {
        let rom = Rom::new(data).during("mmap")?;
        let readonly = self.fd.check_extension(Cap::ReadonlyMem);
        let flags = if readonly { KVM_MEM_READONLY } else { 0 };
        let mut slots = self.slots.lock().unwrap();
        // SAFETY: the mapping lives in `slots.roms` from here on, as long as the VM.
        unsafe { self.add_slot(&mut slots, address, rom.host as u64, rom.size as u64, flags)? };
        slots.roms.push(rom);
        Ok(())
    }

    /// # Safety
    /// `host .. host + size` must stay mapped until the VM is gone.
    unsafe fn add_slot(&self, slots: &mut Slots, guest: u64, host: u64, size: u64, flags: u32) -> Result<()> {
        let region = kvm_userspace_memory_region {
            slot: slots.count,
            flags,
            guest_phys_addr: guest,
            memory_size: size,
            userspace_addr: host,
        };
        // SAFETY: the caller keeps the host memory mapped; KVM checks the rest.
        unsafe { self.fd.set_user_memory_region(region) }.during("KVM_SET_USER_MEMORY_REGION")?;
        slots.count += 1;
        Ok(())
    }

    /// The PICs, the IOAPIC, the local APICs and the PIT, all in the kernel. Before any vCPU.
    pub fn create_irqchip(&self) -> Result<()> {
        self.fd.set_identity_map_address(IDENTITY_MAP).during("KVM_SET_IDENTITY_MAP_ADDR")?;
        self.fd.set_tss_address(TSS).during("KVM_SET_TSS_ADDR")?;
        self.fd.create_irq_chip().during("KVM_CREATE_IRQCHIP")?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        self.fd.create_pit2(pit).during("KVM_CREATE_PIT2")?;
        *self.initial.lock().unwrap() = Some(ChipState::of(&self.fd));
        self.set_msi_routes(&[])
    }

    /// The interrupt controllers and the PIT go back to the state of `create_irqchip`. Not while a vCPU runs.
    pub fn reset(&self) -> Result<()> {
        match &*self.initial.lock().unwrap() {
            Some(Ok(state)) => state.restore(&self.fd),
            Some(Err(error)) => Err(error.clone()),
            None => Err(Error::Guest("the VM has no irqchip to reset".into())),
        }
    }

    /// The interrupt controllers, the PIT and the clock, in a form for another process. Not while a vCPU runs.
    pub fn save(&self) -> Result<Sections> {
        let mut sections = ChipState::of(&self.fd)?.sections();
        sections.insert("clock".to_owned(), state::clock(&self.fd)?.to_le_bytes().into());
        Ok(sections)
    }

    /// Go on from `save`. After all vCPUs: what is pending here is sent to their local APICs.
    pub fn restore(&self, sections: &Sections) -> Result<()> {
        let clock = sections.get("clock").and_then(|bytes| bytes.as_slice().try_into().ok());
        let clock = clock.ok_or_else(|| Error::Guest("the state has no clock".into()))?;
        ChipState::parse(sections)?.restore(&self.fd)?;
        state::set_clock(&self.fd, u64::from_le_bytes(clock))
    }

    /// Set all MSI routes; the pins of the irqchip keep theirs.
    pub fn set_msi_routes(&self, routes: &[MsiRoute]) -> Result<()> {
        let mut entries = irqchip_routes();
        entries.extend(routes.iter().map(msi_entry));
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| super::Error::Call { call: "KVM_SET_GSI_ROUTING", errno: libc::E2BIG })?;
        self.fd.set_gsi_routing(&table).during("KVM_SET_GSI_ROUTING")
    }

    /// A pin of the irqchip; edge or level is what the guest programs.
    pub fn irq_line(self: &Arc<Vm>, gsi: u32) -> KvmLine {
        KvmLine { vm: Arc::downgrade(self), gsi }
    }

    /// Let writes of the guest that match `at` signal the eventfd `fd` in place of an exit.
    pub fn assign_ioeventfd(&self, fd: RawFd, at: IoAddress) -> Result<()> {
        self.ioeventfd(fd, at, 0)
    }

    pub fn deassign_ioeventfd(&self, fd: RawFd, at: IoAddress) -> Result<()> {
        self.ioeventfd(fd, at, 1 << kvm_ioeventfd_flag_nr_deassign)
    }

    fn ioeventfd(&self, fd: RawFd, at: IoAddress, mut flags: u32) -> Result<()> {
        if at.space == Space::Pio {
            flags |= 1 << kvm_ioeventfd_flag_nr_pio;
        }
        if at.datamatch.is_some() {
            flags |= 1 << kvm_ioeventfd_flag_nr_datamatch;
        }
        let (addr, len, datamatch) = (at.address, at.length, at.datamatch.unwrap_or(0));
        let argument = kvm_ioeventfd { datamatch, addr, len, fd, flags, ..Default::default() };
        // SAFETY: the ioctl reads one kvm_ioeventfd, and the kernel checks the fd in it.
        let done = unsafe { ioctl_with_ref(&self.fd, KVM_IOEVENTFD(), &argument) };
        if done < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }.during("KVM_IOEVENTFD")
    }

    /// Let a signal of the eventfd `fd` send the interrupt that is routed to `gsi`.
    pub fn assign_irqfd(&self, fd: RawFd, gsi: u32) -> Result<()> {
        self.fd.register_irqfd(&borrow(fd), gsi).during("KVM_IRQFD")
    }

    pub fn deassign_irqfd(&self, fd: RawFd, gsi: u32) -> Result<()> {
        self.fd.unregister_irqfd(&borrow(fd), gsi).during("KVM_IRQFD")
    }

    /// Answer the 8 ports from `port` on with `serial`.
    pub fn attach_serial(&self, serial: Arc<Serial>, port: u16) {
        self.serials.write().unwrap().push((port, serial));
    }

    /// The serial port that answers `port`, with the register's number.
    pub(super) fn serial_at(&self, port: u16) -> Option<(Arc<Serial>, u8)> {
        let serials = self.serials.read().unwrap();
        let (first, serial) = serials.iter().find(|(first, _)| (port.wrapping_sub(*first)) < 8)?;
        Some((Arc::clone(serial), (port - first) as u8))
    }

    /// The vCPU with APIC id `index`. Number 0 starts at the reset vector, the others wait for a SIPI.
    pub fn create_vcpu(self: &Arc<Vm>, index: u32) -> Result<Vcpu> {
        let fd = self.fd.create_vcpu(u64::from(index)).during("KVM_CREATE_VCPU")?;
        Ok(Vcpu::new(Arc::clone(self), index, fd))
    }
}

/// The number as an EventFd that is not closed here; the kernel refuses what is no eventfd.
fn borrow(fd: RawFd) -> ManuallyDrop<EventFd> {
    // SAFETY: never dropped, so nothing is closed that we do not own.
    ManuallyDrop::new(unsafe { EventFd::from_raw_fd(fd) })
}

/// What KVM sets up by itself, but with the PIT on pin 2 of the IOAPIC, where PCs have it and ACPI says it is.
fn irqchip_routes() -> Vec<kvm_irq_routing_entry> {
    let pic = (0..PIC_PINS).map(|gsi| match gsi {
        0..8 => pin_entry(gsi, KVM_IRQCHIP_PIC_MASTER, gsi),
        _ => pin_entry(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - 8),
    });
    let ioapic = (0..IOAPIC_PINS).filter(|gsi| *gsi != 2).map(|gsi| {
        let pin = if gsi == 0 { 2 } else { gsi };
        pin_entry(gsi, KVM_IRQCHIP_IOAPIC, pin)
    });
    pic.chain(ioapic).collect()
}

fn pin_entry(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
    entry.u.irqchip.irqchip = irqchip;
    entry.u.irqchip.pin = pin;
    entry
}

fn msi_entry(route: &MsiRoute) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi: route.gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    entry.u.msi.address_lo = route.address as u32;
    entry.u.msi.address_hi = (route.address >> 32) as u32;
    entry.u.msi.data = route.data;
    entry
}

/// One pin of the irqchip, driven by KVM_IRQ_LINE.
pub struct KvmLine {
    /// Weak, because the VM holds the serial port, which holds its line.
    vm: Weak<Vm>,
    gsi: u32,
}

impl Line for KvmLine {
    fn set(&self, level: bool) {
        // Fails only without an irqchip, and then there is nobody to interrupt.
        if let Some(vm) = self.vm.upgrade() {
            let _ = vm.fd.set_irq_line(self.gsi, level);
        }
    }
}

/// Host memory behind a read-only slot.
struct Rom {
    host: *mut libc::c_void,
    size: usize,
}

// SAFETY: the mapping is written once, in `new`, before anybody else can see it.
unsafe impl Send for Rom {}

impl Rom {
    fn new(data: &[u8]) -> std::io::Result<Rom> {
        let size = data.len().next_multiple_of(PAGE);
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a fresh anonymous mapping replaces nothing.
        let host = unsafe { libc::mmap(std::ptr::null_mut(), size, protection, flags, -1, 0) };
        if host == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: the mapping holds at least data.len() bytes and nobody else knows it yet.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), host.cast(), data.len()) };
        Ok(Rom { host, size })
    }
}

impl Drop for Rom {
    fn drop(&mut self) {
        // SAFETY: made by mmap in `new` with this size; the VM that used it is going away with its last vCPU.
        unsafe { libc::munmap(self.host, self.size) };
    }
}
