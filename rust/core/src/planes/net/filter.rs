//! Which frames a driver wants to receive (virtio 1.3, 5.1.6.5.1 to 5.1.6.5.3).

/// Bytes of a frame that decide: the addresses, the type and a VLAN tag.
pub const DECIDING: usize = 18;

pub type Mac = [u8; 6];

const BROADCAST: Mac = [0xFF; 6];
const VLAN: [u8; 2] = [0x81, 0x00];
const VLANS: usize = 4096;

/// What the driver asked for through the control queue; at first every frame passes.
#[derive(Debug, Clone)]
pub struct Filter {
    pub promiscuous: bool,
    pub all_multicast: bool,
    pub all_unicast: bool,
    pub no_multicast: bool,
    pub no_unicast: bool,
    pub no_broadcast: bool,
    /// The device's own address and those of the tables.
    pub macs: Vec<Mac>,
    /// A bit for each VLAN id that passes; None while the driver does not filter by VLAN.
    pub vlans: Option<Vec<u8>>,
}

impl Default for Filter {
    fn default() -> Self {
        Self {
            promiscuous: true,
            all_multicast: false,
            all_unicast: false,
            no_multicast: false,
            no_unicast: false,
            no_broadcast: false,
            macs: Vec::new(),
            vlans: None,
        }
    }
}

impl Filter {
    /// Whether the driver wants the frame that begins with these bytes; zeroes stand where it is shorter.
    pub fn passes(&self, start: &[u8; DECIDING]) -> bool {
        self.promiscuous || (self.vlan_passes(start) && self.address_passes(start))
    }

    fn vlan_passes(&self, start: &[u8; DECIDING]) -> bool {
        let Some(vlans) = &self.vlans else {
            return true;
        };
        let id = usize::from(u16::from_be_bytes([start[14], start[15]])) % VLANS;
        start[12..14] != VLAN || vlans.get(id / 8).is_some_and(|byte| byte >> (id % 8) & 1 != 0)
    }

    fn address_passes(&self, start: &[u8; DECIDING]) -> bool {
        let to = &start[..6];
        if to == BROADCAST {
            return !self.no_broadcast;
        }
        let (none, all) = match to[0] & 1 {
            0 => (self.no_unicast, self.all_unicast),
            _ => (self.no_multicast, self.all_multicast),
        };
        !none && (all || self.macs.iter().any(|mac| mac == to))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: Mac = [2, 0, 0, 0, 0, 1];
    const OTHER: Mac = [2, 0, 0, 0, 0, 2];
    const GROUP: Mac = [0x33, 0x33, 0, 0, 0, 1];

    fn start(to: Mac, vlan: Option<u16>) -> [u8; DECIDING] {
        let mut start = [0; DECIDING];
        start[..6].copy_from_slice(&to);
        if let Some(tag) = vlan {
            start[12..14].copy_from_slice(&VLAN);
            start[14..16].copy_from_slice(&tag.to_be_bytes());
        }
        start
    }

    fn selective() -> Filter {
        Filter { promiscuous: false, macs: vec![OWN], ..Filter::default() }
    }

    #[test]
    fn at_first_everything_passes() {
        for to in [OWN, OTHER, GROUP, BROADCAST] {
            assert!(Filter::default().passes(&start(to, Some(7))));
        }
    }

    #[test]
    fn its_own_address_and_broadcasts_pass() {
        let passed = [OWN, OTHER, GROUP, BROADCAST].map(|to| selective().passes(&start(to, None)));
        assert_eq!(passed, [true, false, false, true]);
    }

    #[test]
    fn each_mode_concerns_its_kind_of_address() {
        type Mode = (fn(&mut Filter), [bool; 4]);
        let modes: [Mode; 5] = [
            (|filter| filter.all_unicast = true, [true, true, false, true]),
            (|filter| filter.all_multicast = true, [true, false, true, true]),
            (|filter| filter.no_unicast = true, [false, false, false, true]),
            (|filter| (filter.all_multicast, filter.no_multicast) = (true, true), [true, false, false, true]),
            (|filter| filter.no_broadcast = true, [true, false, false, false]),
        ];
        for (change, expected) in modes {
            let mut filter = selective();
            change(&mut filter);
            assert_eq!([OWN, OTHER, GROUP, BROADCAST].map(|to| filter.passes(&start(to, None))), expected);
        }
    }

    #[test]
    fn a_tagged_frame_passes_by_its_vlan_whatever_its_priority() {
        let mut vlans = vec![0; VLANS / 8];
        vlans[100 / 8] |= 1 << (100 % 8);
        let filter = Filter { vlans: Some(vlans), ..selective() };
        assert!(filter.passes(&start(OWN, Some(100))));
        assert!(filter.passes(&start(OWN, Some(0xE000 | 100))));
        assert!(!filter.passes(&start(OWN, Some(101))));
        assert!(filter.passes(&start(OWN, None)));
    }
}
