//! The state a vCPU starts in when no firmware brings it there.

use kvm_bindings::{kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs, Msrs};
use kvm_ioctls::VcpuFd;

use super::{During, Error, Result};
use crate::memory::GuestMemory;

/// Guest pages that hold the GDT and the identity page tables (PML4, PDPT and four page directories).
const GDT: u64 = 0x8000;
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
const DIRECTORIES: u64 = 0xb000;

const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const PROTECTED_CODE: u64 = 0x00cf_9b00_0000_ffff;
const LONG_CODE: u64 = 0x00af_9b00_0000_ffff;
const FLAT_DATA: u64 = 0x00cf_9300_0000_ffff;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

const PRESENT_WRITABLE: u64 = 0b11;
const LARGE_PAGE: u64 = 1 << 7;

const MISC_ENABLE: u32 = 0x1a0;
const FAST_STRINGS: u64 = 1;
const MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

const APIC_LVT_LINT0: usize = 0x350;
const APIC_LVT_LINT1: usize = 0x360;
const DELIVER_EXTINT: u32 = 7 << 8;
const DELIVER_NMI: u32 = 4 << 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Real,
    Protected,
    Long,
}

/// The 64-bit boot protocol of Linux: long mode, flat segments, rsi = boot_params, interrupts off.
pub(super) fn linux_entry(fd: &VcpuFd, memory: &GuestMemory, entry: u64, boot_params: u64) -> Result<()> {
    enter(fd, Some(memory), Mode::Long)?;
    let regs = kvm_regs { rip: entry, rsi: boot_params, rflags: 2, ..Default::default() };
    fd.set_regs(&regs).during("KVM_SET_REGS")?;
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
    fd.set_fpu(&fpu).during("KVM_SET_FPU")?;
    set_msrs(fd)?;
    connect_lints(fd)
}

/// Bring the segments, paging and control registers into `mode`; all but real mode write tables to guest memory.
pub(super) fn enter(fd: &VcpuFd, memory: Option<&GuestMemory>, mode: Mode) -> Result<()> {
    let mut sregs = fd.get_sregs().during("KVM_GET_SREGS")?;
    match mode {
        Mode::Real => real_mode(&mut sregs),
        Mode::Protected => {
            write_gdt(memory, PROTECTED_CODE)?;
            protected_mode(&mut sregs, PROTECTED_CODE);
        }
        Mode::Long => {
            write_gdt(memory, LONG_CODE)?;
            write_page_tables(memory)?;
            protected_mode(&mut sregs, LONG_CODE);
            long_mode(&mut sregs);
        }
    }
    fd.set_sregs(&sregs).during("KVM_SET_SREGS")
}

fn real_mode(sregs: &mut kvm_sregs) {
    let flat = |code: bool| kvm_segment {
        limit: 0xffff,
        type_: if code { 0xb } else { 3 },
        present: 1,
        s: 1,
        ..Default::default()
    };
    sregs.cs = flat(true);
    for segment in data_segments(sregs) {
        *segment = flat(false);
    }
    sregs.cr0 = CR0_ET;
}

fn protected_mode(sregs: &mut kvm_sregs, code: u64) {
    sregs.cs = segment(CODE, code);
    for data in data_segments(sregs) {
        *data = segment(DATA, FLAT_DATA);
    }
    sregs.gdt.base = GDT;
    sregs.gdt.limit = 4 * 8 - 1;
    sregs.cr0 = CR0_PE | CR0_ET;
}

fn long_mode(sregs: &mut kvm_sregs) {
    sregs.cr3 = PML4;
    sregs.cr4 |= CR4_PAE;
    sregs.cr0 |= CR0_PG;
    sregs.efer |= EFER_LME | EFER_LMA;
}

fn data_segments(sregs: &mut kvm_sregs) -> [&mut kvm_segment; 5] {
    [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss]
}

/// What the CPU caches for a flat descriptor.
fn segment(selector: u16, descriptor: u64) -> kvm_segment {
    let bit = |number: u64| (descriptor >> number & 1) as u8;
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: (descriptor >> 40 & 0xf) as u8,
        s: bit(44),
        dpl: 0,
        present: bit(47),
        avl: 0,
        l: bit(53),
        db: bit(54),
        g: bit(55),
        ..Default::default()
    }
}

fn write_gdt(memory: Option<&GuestMemory>, code: u64) -> Result<()> {
    write_words(memory, GDT, &[0, 0, code, FLAT_DATA])
}

/// Map the first 4 GiB to themselves in pages of 2 MiB.
fn write_page_tables(memory: Option<&GuestMemory>) -> Result<()> {
    write_words(memory, PML4, &[PDPT | PRESENT_WRITABLE])?;
    let directories: Vec<u64> = (0..4).map(|index| (DIRECTORIES + index * 0x1000) | PRESENT_WRITABLE).collect();
    write_words(memory, PDPT, &directories)?;
    let pages: Vec<u64> = (0..4 * 512).map(|index| index << 21 | LARGE_PAGE | PRESENT_WRITABLE).collect();
    write_words(memory, DIRECTORIES, &pages)
}

fn write_words(memory: Option<&GuestMemory>, address: u64, words: &[u64]) -> Result<()> {
    let missing = || Error::Guest(format!("no guest memory at {address:#x} for the tables of this mode"));
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    memory.ok_or_else(missing)?.write(address, &bytes).map_err(|_| missing())
}

/// The memory types that firmware sets up on every CPU. A KVM that does not know one of them (software KVM) goes on.
pub(super) fn set_msrs(fd: &VcpuFd) -> Result<()> {
    for (index, data) in [(MISC_ENABLE, FAST_STRINGS), (MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK)] {
        let entry = kvm_msr_entry { index, data, ..Default::default() };
        let msrs = Msrs::from_entries(&[entry]).expect("one entry fits");
        fd.set_msrs(&msrs).during("KVM_SET_MSRS")?;
    }
    Ok(())
}

/// As firmware leaves it: the PIC reaches LINT0 of the boot CPU, NMI reaches LINT1.
fn connect_lints(fd: &VcpuFd) -> Result<()> {
    let mut lapic = fd.get_lapic().during("KVM_GET_LAPIC")?;
    for (register, delivery) in [(APIC_LVT_LINT0, DELIVER_EXTINT), (APIC_LVT_LINT1, DELIVER_NMI)] {
        for (byte, value) in lapic.regs[register..register + 4].iter_mut().zip(delivery.to_le_bytes()) {
            *byte = value as _;
        }
    }
    fd.set_lapic(&lapic).during("KVM_SET_LAPIC")
}
