//! CPUID as the guest sees it: what the host supports, with an APIC id and a topology of single-threaded cores.

use kvm_bindings::{kvm_cpuid_entry2, CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::Cap;

use super::{During, Error, Result, Vm};

const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
const HTT: u32 = 1 << 28;
const CMP_LEGACY: u32 = 1 << 1;

/// Bits of the APIC id that number `cpus` cores.
fn core_bits(cpus: u32) -> u32 {
    cpus.max(1).next_power_of_two().trailing_zeros()
}

pub(super) fn for_vcpu(vm: &Vm, index: u32, cpus: u32) -> Result<CpuId> {
    let supported = vm.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).during("KVM_GET_SUPPORTED_CPUID")?;
    let deadline = vm.fd.check_extension(Cap::TscDeadlineTimer);
    let mut entries: Vec<_> = supported.as_slice().to_vec();
    entries.retain(|entry| !matches!(entry.function, 0xb | 0x1f));
    let highest = entries.iter().find(|entry| entry.function == 0).map_or(0, |entry| entry.eax);
    for entry in &mut entries {
        adjust(entry, index, cpus, deadline);
    }
    for function in [0xb, 0x1f] {
        if function <= highest {
            entries.extend(topology(function, index, cpus));
        }
    }
    CpuId::from_entries(&entries).map_err(|_| Error::Call { call: "KVM_SET_CPUID2", errno: libc::E2BIG })
}

/// What tells whether a guest of one host can go on on another: vendor, model, and the features that it may use.
pub(super) fn features(vm: &Vm) -> Result<Vec<u8>> {
    let supported = vm.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).during("KVM_GET_SUPPORTED_CPUID")?;
    let words = supported.as_slice().iter().flat_map(|entry| match (entry.function, entry.index) {
        (0, _) => vec![entry.ebx, entry.ecx, entry.edx],
        (1 | 0x8000_0001, _) => vec![entry.eax, entry.ecx, entry.edx],
        (7, _) => vec![entry.ebx, entry.ecx, entry.edx],
        (0xd, 0) => vec![entry.eax, entry.edx],
        _ => vec![],
    });
    Ok(words.flat_map(u32::to_le_bytes).collect())
}

fn adjust(entry: &mut kvm_cpuid_entry2, index: u32, cpus: u32, deadline: bool) {
    match entry.function {
        1 => {
            entry.ebx = (entry.ebx & 0xffff) | (1 << core_bits(cpus)) << 16 | index << 24;
            entry.ecx |= HYPERVISOR | if deadline { TSC_DEADLINE } else { 0 };
            entry.edx = (entry.edx & !HTT) | if cpus > 1 { HTT } else { 0 };
        }
        4 if entry.eax & 0x1f != 0 => {
            let cores = (1 << core_bits(cpus)) - 1;
            entry.eax = (entry.eax & 0x3fff) | cache_sharing(entry.eax, cpus) | cores << 26;
        }
        0x8000_0001 => entry.ecx = (entry.ecx & !CMP_LEGACY) | if cpus > 1 { CMP_LEGACY } else { 0 },
        0x8000_0008 => entry.ecx = (entry.ecx & !0xf0ff) | core_bits(cpus) << 12 | (cpus - 1),
        0x8000_001d if entry.eax & 0x1f != 0 => {
            entry.eax = (entry.eax & 0x3fff) | cache_sharing(entry.eax, cpus);
        }
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (index, index & 0xff, 0),
        _ => {}
    }
}

/// Bits 25:14 of a cache leaf: the last-level cache is everybody's, the others belong to one core.
fn cache_sharing(eax: u32, cpus: u32) -> u32 {
    let level = eax >> 5 & 7;
    if level >= 3 {
        (cpus - 1) << 14
    } else {
        0
    }
}

/// Leaf 0xb or 0x1f: one thread per core, `cpus` cores per package.
fn topology(function: u32, index: u32, cpus: u32) -> [kvm_cpuid_entry2; 3] {
    let level = |number: u32, kind: u32, shift: u32, threads: u32| kvm_cpuid_entry2 {
        function,
        index: number,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: threads,
        ecx: number | kind << 8,
        edx: index,
        ..Default::default()
    };
    [level(0, 1, 0, 1), level(1, 2, core_bits(cpus), cpus), level(2, 0, 0, 0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_core_has_an_apic_id_of_its_own_within_the_package() {
        let [thread, core, end] = topology(0xb, 5, 6);
        assert_eq!((thread.eax, thread.ebx, thread.ecx), (0, 1, 1 << 8));
        assert_eq!((core.eax, core.ebx, core.ecx), (3, 6, 1 | 2 << 8));
        assert_eq!(end.ecx >> 8, 0);
        assert!([thread, core, end].iter().all(|level| level.edx == 5));
    }

    #[test]
    fn leaf_1_carries_the_apic_id_and_the_hypervisor_bit() {
        let mut leaf = kvm_cpuid_entry2 { function: 1, ebx: 0xffff_0800, ..Default::default() };
        adjust(&mut leaf, 1, 2, true);
        assert_eq!(leaf.ebx, 0x0102_0800);
        assert_eq!(leaf.ecx, HYPERVISOR | TSC_DEADLINE);
        assert_eq!(leaf.edx, HTT);
    }
}
