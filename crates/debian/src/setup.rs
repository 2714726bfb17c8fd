//! What maintainer scripts would have made, as far as a system needs it to boot: accounts, PAM, names, the console,
//! the network, APT's sources.
//!
//! Everything else is left to the scripts themselves, which `yado-configure.service` runs inside the guest soon after the first
//! boot, or dpkg when it is first used. What is written here is what those scripts write, so they find it as they would leave it.

use crate::accounts::Accounts;
use crate::dpkg::OwnFile;
use crate::initramfs;
use crate::modules;
use crate::tree::{self, Keep, Metadata, Package, Root};
use md5::{Digest, Md5};
use std::collections::BTreeMap;
use std::fmt::Write;

/// A file that the caller adds to the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestFile {
    /// Absolute path in the guest.
    pub path: String,
    /// What is there.
    pub content: Content,
}

/// What a [`GuestFile`] is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// A file with these permission bits, owned by root.
    File(u16, std::borrow::Cow<'static, [u8]>),
    /// A symbolic link to this target.
    Link(String),
}

/// Suites of one archive, for APT inside the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AptSource {
    /// The archive's base.
    pub base: String,
    /// Its suites in use.
    pub suites: Vec<String>,
}

/// What differs between guests.
#[derive(Clone, Debug)]
pub struct Settings<'a> {
    /// The program that is `/init` where an initial RAM disk is needed.
    pub init: &'a [u8],
    /// Host name.
    pub hostname: &'a str,
    /// APT's sources.
    pub sources: &'a [AptSource],
    /// Files of the caller.
    pub files: &'a [GuestFile],
    /// Time of the build in seconds since 1970.
    pub time: i64,
}

/// What [`install`] has made.
#[derive(Clone, Debug, Default)]
pub struct Installed {
    /// The paths that belong to `yado-guest`.
    pub own: Vec<OwnFile>,
    /// The initial RAM disk of the newest kernel, if it needs one.
    pub initrd: Option<Vec<u8>>,
}

/// Why [`install`] failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file has no place.
    #[error(transparent)]
    Tree(#[from] tree::Error),
    /// The initial RAM disk could not be made.
    #[error(transparent)]
    Initramfs(#[from] initramfs::Error),
}

/// The package files that [`install`] reads.
pub const KEEP: Keep = Keep {
    wants,
    essence: |path, bytes| if modules::is_module(path) { modules::essence(path, bytes) } else { bytes },
};

fn wants(path: &str) -> bool {
    (path.starts_with("usr/lib/sysusers.d/") && path.ends_with(".conf"))
        || (path.starts_with("usr/share/pam/common-") && !path.ends_with(".md5sums"))
        || path.starts_with("usr/share/base-passwd/")
        || path.starts_with("usr/share/base-files/")
        || path.starts_with("boot/vmlinuz-")
        || (path.starts_with("usr/lib/modules/") && path.ends_with("/modules.builtin"))
        || modules::is_module(path)
}

/// Files that belong to the package `yado-guest`.
const OWN_FILES: [(&str, u16, &str); 10] = [
    (
        "usr/lib/yado/configure",
        0o755,
        "#!/bin/sh\n\
         # Runs the maintainer scripts of the packages that the image was built from, then never again. Called by a unit soon after\n\
         # the first boot, and by dpkg before it does anything else: packages can be installed only upon configured ones.\n\
         [ -e /var/lib/yado/configured ] && exit 0\n\
         case \"$YADO_CONFIGURE$DPKG_FRONTEND_LOCKED\" in\n\
         '') [ \"$(id -u)\" = 0 ] || exit 0\n\
         \texport YADO_CONFIGURE=begun\n\
         \tflock -o /run/yado-configure.lock \"$0\" </dev/null >&2 && exit 0\n\
         \techo 'yado: not all packages could be configured; `dpkg --audit` lists them' >&2\n\
         \t# dpkg must go on, for it is what repairs packages.\n\
         \t[ -n \"$DPKG_HOOK_ACTION\" ]\n\
         \texit ;;\n\
         begun) ;;\n\
         # dpkg under this script, or under apt, which orders configuration itself.\n\
         *) exit 0 ;;\n\
         esac\n\
         export YADO_CONFIGURE=busy\n\
         set -e\n\
         export DEBIAN_FRONTEND=noninteractive DEBCONF_NONINTERACTIVE_SEEN=true\n\
         export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8\n\
         # dpkg does not wait for its lock; proc_locks(5) has its inode.\n\
         touch /var/lib/dpkg/lock-frontend\n\
         while grep -q \":$(stat -c %i /var/lib/dpkg/lock-frontend) \" /proc/locks; do sleep 1; done\n\
         # Scripts run where /run/systemd is hidden: one that sees no running systemd enables its units without a reload and\n\
         # a start each, which together take longer than all the rest; both are done once at the end.\n\
         unshare --mount --propagation private sh -ec '\n\
         mount -t tmpfs -o mode=755 tmpfs /run/systemd\n\
         exec dpkg --configure -a --force-confdef --force-confold --force-unsafe-io\n\
         '\n\
         sync\n\
         touch /var/lib/yado/configured\n\
         systemctl daemon-reload\n\
         systemctl start --no-block default.target\n",
    ),
    (
        "usr/lib/systemd/system/yado-configure.service",
        0o644,
        "[Unit]\n\
         Description=Finish the configuration of packages\n\
         ConditionPathExists=!/var/lib/yado/configured\n\
         \n\
         [Service]\n\
         # Not oneshot: the boot need not wait for it.\n\
         Type=exec\n\
         ExecStart=/usr/lib/yado/configure\n\
         Nice=19\n\
         CPUSchedulingPolicy=idle\n\
         IOSchedulingClass=idle\n\
         TimeoutStartSec=infinity\n\
         # Scripts may start services of their own, which must outlive this one.\n\
         KillMode=process\n",
    ),
    (
        "usr/lib/systemd/system/yado-configure.timer",
        0o644,
        "[Unit]\n\
         Description=Finish the configuration of packages soon after the first boot\n\
         ConditionPathExists=!/var/lib/yado/configured\n\
         \n\
         [Timer]\n\
         # Late enough that a short command in a fresh guest never pays for it.\n\
         OnBootSec=30s\n\
         AccuracySec=1s\n",
    ),
    (
        "usr/lib/systemd/system/serial-getty@.service.d/yado.conf",
        0o644,
        "# Who holds the console of a virtual machine already owns the machine.\n\
         [Service]\n\
         ExecStart=\n\
         ExecStart=-/sbin/agetty --autologin root -o '-p -f -- \\\\u' --noclear --keep-baud 115200,57600,38400,9600 - $TERM\n",
    ),
    (
        "usr/lib/systemd/journald.conf.d/yado.conf",
        0o644,
        "# In memory: most guests live shortly, and writing the journal makes each boot slower.\n\
         [Journal]\n\
         Storage=volatile\n",
    ),
    (
        "usr/lib/systemd/network/80-yado.network",
        0o644,
        "[Match]\n\
         Kind=!*\n\
         Type=ether\n\
         \n\
         [Network]\n\
         DHCP=yes\n\
         # What yado's agent has configured is not taken away from the programs that use it already.\n\
         KeepConfiguration=yes\n\
         \n\
         # So that other guests are found without their zone.\n\
         [DHCPv4]\n\
         UseDomains=yes\n",
    ),
    (
        "usr/lib/yado/resolv-conf",
        0o755,
        "#!/bin/sh\n\
         # Tells the C library the name servers that the network daemon learnt; a link belongs to another program.\n\
         [ -L /etc/resolv.conf ] && exit 0\n\
         state=/run/systemd/netif/state\n\
         {\n\
         \tfor server in $(sed -n 's/^DNS=//p' $state); do echo \"nameserver $server\"; done\n\
         \tsed -n 's/^DOMAINS=\\(.\\)/search \\1/p' $state\n\
         } >/etc/resolv.conf.new && mv /etc/resolv.conf.new /etc/resolv.conf\n",
    ),
    (
        "usr/lib/systemd/system/yado-resolv-conf.service",
        0o644,
        "[Unit]\n\
         Description=Name servers of the network\n\
         \n\
         [Service]\n\
         Type=oneshot\n\
         ExecStart=/usr/lib/yado/resolv-conf\n",
    ),
    (
        "usr/lib/systemd/system/yado-resolv-conf.path",
        0o644,
        "[Unit]\n\
         Description=Changes of the network\n\
         \n\
         [Path]\n\
         PathChanged=/run/systemd/netif/state\n",
    ),
    (
        "usr/lib/udev/rules.d/80-yado-network.rules",
        0o644,
        "# The network daemon is started by the first network card, so that a guest without one boots faster. Renaming a card is a\n\
         # second event, which must say the same.\n\
         ACTION!=\"remove\", SUBSYSTEM==\"net\", KERNEL!=\"lo\", TAG+=\"systemd\", ENV{SYSTEMD_WANTS}+=\"systemd-networkd.service\"\n",
    ),
];

/// Settings of the administrator, as an installer would write them.
const ADMINISTRATOR_FILES: [(&str, u16, &str); 10] = [
    (
        "etc/fstab",
        0o644,
        "# <file system> <mount point> <type> <options> <dump> <pass>\n/dev/nvme0n1 / ext4 defaults,x-systemd.growfs 0 0\n",
    ),
    // Empty: systemd makes one at each first boot, so that copies of the image differ.
    ("etc/machine-id", 0o444, ""),
    ("etc/default/locale", 0o644, "LANG=C.UTF-8\n"),
    ("etc/locale.conf", 0o644, "LANG=C.UTF-8\n"),
    ("etc/adjtime", 0o644, "0.0 0 0.0\n0\nUTC\n"),
    (
        "etc/apt/apt.conf.d/90yado",
        0o644,
        "// The first boot's configuration of packages holds the lock for a while.\nDPkg::Lock::Timeout \"600\";\n",
    ),
    (
        "etc/dpkg/dpkg.cfg.d/yado",
        0o644,
        "# Packages can be installed only upon configured ones: the first boot's configuration comes first.\n\
         pre-invoke=/usr/lib/yado/configure\n",
    ),
    // Timers that were never run fire at once when they are enabled; updates need not be the guest's first act.
    ("etc/systemd/system/apt-daily.timer.d/yado.conf", 0o644, "[Timer]\nPersistent=false\n"),
    ("etc/systemd/system/apt-daily-upgrade.timer.d/yado.conf", 0o644, "[Timer]\nPersistent=false\n"),
    // The kernel is started directly, so links to it and to an initramfs lead nowhere useful.
    ("etc/kernel-img.conf", 0o644, "do_symlinks = no\n"),
];

/// Symbolic links: units to enable, generators to leave out.
const LINKS: [(&str, &str); 5] = [
    ("usr/lib/systemd/system/timers.target.wants/yado-configure.timer", "../yado-configure.timer"),
    (
        "usr/lib/systemd/system/systemd-networkd.service.wants/yado-resolv-conf.path",
        "../yado-resolv-conf.path",
    ),
    // Generators that only look for what such a guest does not have: partitions, hibernation, and a socket of the host.
    ("etc/systemd/system-generators/systemd-gpt-auto-generator", "/dev/null"),
    ("etc/systemd/system-generators/systemd-hibernate-resume-generator", "/dev/null"),
    ("etc/systemd/system-generators/systemd-ssh-generator", "/dev/null"),
];

/// Names that programs rely on before `update-alternatives` has made them. Links to the programs themselves, which it takes over silently.
const ALTERNATIVES: [(&str, &str); 5] = [
    ("usr/bin/awk", "mawk"),
    ("usr/bin/which", "which.debianutils"),
    ("usr/bin/pager", "less"),
    ("usr/bin/vi", "vim.tiny"),
    ("usr/bin/editor", "vim.tiny"),
];

/// What `pam-auth-update` puts into the templates of /usr/share/pam for the profile `unix` alone.
const PAM_BLOCKS: [(&str, &str); 10] = [
    ("$auth_primary", "auth\t[success=1 default=ignore]\tpam_unix.so nullok"),
    ("$auth_additional", ""),
    ("$account_primary", "account\t[success=1 new_authtok_reqd=done default=ignore]\tpam_unix.so "),
    ("$account_additional", ""),
    ("$password_primary", "password\t[success=1 default=ignore]\tpam_unix.so obscure yescrypt"),
    ("$password_additional", ""),
    ("$session_primary", "session\t[default=1]\t\t\tpam_permit.so"),
    ("$session_additional", "session\trequired\tpam_unix.so "),
    ("$session_nonint_primary", "session\t[default=1]\t\t\tpam_permit.so"),
    ("$session_nonint_additional", "session\trequired\tpam_unix.so "),
];

/// What `pam-auth-update` remembers of that, by the file it is about. Without it, it takes its own files for the administrator's and
/// never adds the modules of packages that come later, such as logind's.
const PAM_SAVED: [(&str, &str); 6] = [
    ("auth", "Module: unix\n[success=end default=ignore]\tpam_unix.so nullok\n"),
    ("account", "Module: unix\n[success=end new_authtok_reqd=done default=ignore]\tpam_unix.so\n"),
    ("password", "Module: unix\n[success=end default=ignore]\tpam_unix.so obscure yescrypt\n"),
    ("session", "Module: null\n[default=1]\t\t\tpam_permit.so\nModule: unix\nrequired\tpam_unix.so\n"),
    (
        "session-noninteractive",
        "Module: null\n[default=1]\t\t\tpam_permit.so\nModule: unix\nrequired\tpam_unix.so\n",
    ),
    ("seen", "unix\n"),
];

/// The builder as the one who puts files in.
fn builder(names: &[String]) -> Package<'_> {
    Package { number: usize::MAX, name: crate::dpkg::OWN_PACKAGE, yields: &[], names, digests: &[] }
}

/// Puts files into the tree on behalf of the builder, and remembers which.
struct Installer<'r, 't> {
    root: &'r mut Root<'t>,
    names: Vec<String>,
    time: i64,
    own: Vec<OwnFile>,
}

impl Installer<'_, '_> {
    fn meta(&self, mode: u16) -> Metadata {
        Metadata { mode, mtime: self.time, ..Metadata::default() }
    }

    fn file(&mut self, path: &str, mode: u16, bytes: &[u8]) -> Result<(), tree::Error> {
        self.file_of_group(path, mode, 0, bytes)
    }

    fn file_of_group(&mut self, path: &str, mode: u16, gid: u32, bytes: &[u8]) -> Result<(), tree::Error> {
        let meta = Metadata { gid, ..self.meta(mode) };
        self.file_with(path, &meta, bytes)
    }

    fn file_with(&mut self, path: &str, meta: &Metadata, bytes: &[u8]) -> Result<(), tree::Error> {
        let size = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        self.root.file(&builder(&self.names), path, meta, size, &mut &*bytes)
    }

    fn link(&mut self, path: &str, target: &str) -> Result<(), tree::Error> {
        let meta = self.meta(0o777);
        self.root.symlink(&builder(&self.names), path, &meta, target)
    }

    fn directory(&mut self, path: &str) -> Result<(), tree::Error> {
        let meta = self.meta(0o755);
        self.root.directory(&builder(&self.names), path, &meta)
    }

    fn kept(&self, path: &str) -> Option<String> {
        self.root.kept.get(path).map(|bytes| String::from_utf8_lossy(bytes).into_owned())
    }
}

fn digest(bytes: &[u8]) -> String {
    crate::cache::hex(&Md5::digest(bytes))
}

/// Writes everything into the tree.
pub fn install(root: &mut Root<'_>, names: &[String], settings: &Settings<'_>) -> Result<Installed, Error> {
    let mut installer = Installer { root, names: names.to_vec(), time: settings.time, own: Vec::new() };
    for (path, mode, text) in OWN_FILES {
        installer.file(path, mode, text.as_bytes())?;
        installer.own.push((format!("/{path}"), Some(digest(text.as_bytes()))));
    }
    for (path, mode, text) in ADMINISTRATOR_FILES {
        installer.file(path, mode, text.as_bytes())?;
    }
    for (path, target) in LINKS {
        installer.link(path, target)?;
        installer.own.push((format!("/{path}"), None));
    }
    for (link, program) in ALTERNATIVES {
        if installer.root.has(&format!("usr/bin/{program}")) && !installer.root.has(link) {
            installer.link(link, program)?;
        }
    }
    names_and_sources(&mut installer, settings)?;
    accounts(&mut installer, settings.time)?;
    pam(&mut installer)?;
    let initrd = kernel_modules(&mut installer, settings.init)?;
    for path in ["media", "mnt", "opt", "srv", "var/lib/yado"] {
        installer.directory(path)?;
    }
    for file in settings.files {
        let path = file.path.trim_start_matches('/');
        let digest = match &file.content {
            Content::File(mode, bytes) => {
                installer.file(path, *mode, bytes)?;
                Some(digest(bytes))
            }
            Content::Link(target) => {
                installer.link(path, target)?;
                None
            }
        };
        installer.own.push((format!("/{path}"), digest));
    }
    // Newer than /usr, so that systemd does not rebuild at each first boot what is already there (systemd.unit(5), ConditionNeedsUpdate).
    for path in ["etc/.updated", "var/.updated"] {
        let meta = Metadata { mtime: settings.time.saturating_add(1), ..installer.meta(0o644) };
        installer.file_with(path, &meta, &[])?;
    }
    Ok(Installed { own: installer.own, initrd })
}

fn names_and_sources(installer: &mut Installer<'_, '_>, settings: &Settings<'_>) -> Result<(), tree::Error> {
    let hostname = settings.hostname;
    installer.file("etc/hostname", 0o644, format!("{hostname}\n").as_bytes())?;
    let hosts = format!(
        "127.0.0.1\tlocalhost\n127.0.1.1\t{hostname}\n\n::1\tlocalhost ip6-localhost ip6-loopback\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n"
    );
    installer.file("etc/hosts", 0o644, hosts.as_bytes())?;
    for (from, to) in [
        ("nsswitch.conf", "etc/nsswitch.conf"),
        ("dot.profile", "root/.profile"),
        ("dot.bashrc", "root/.bashrc"),
        ("profile", "etc/profile"),
        ("motd", "etc/motd"),
    ] {
        if let Some(text) = installer.kept(&format!("usr/share/base-files/{from}")) {
            installer.file(to, 0o644, text.as_bytes())?;
        }
    }
    let mut sources = String::new();
    for source in settings.sources {
        let suites = source.suites.join(" ");
        let _ = write!(
            sources,
            "Types: deb\nURIs: {}\nSuites: {suites}\nComponents: main\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n\n",
            source.base
        );
    }
    installer.file("etc/apt/sources.list.d/debian.sources", 0o644, sources.as_bytes())
}

fn accounts(installer: &mut Installer<'_, '_>, time: i64) -> Result<(), tree::Error> {
    let master =
        |name: &str| installer.kept(&format!("usr/share/base-passwd/{name}.master")).unwrap_or_default();
    let mut accounts = Accounts::from_masters(&master("passwd"), &master("group"));
    let mut files: Vec<_> =
        installer.root.kept.keys().filter(|path| path.starts_with("usr/lib/sysusers.d/")).cloned().collect();
    files.sort_unstable();
    for file in files {
        accounts.add_sysusers(&installer.kept(&file).unwrap_or_default());
    }
    let day = u64::try_from(time / 86_400).unwrap_or(0);
    // Group 42 is `shadow` (base-passwd): only it may read the password files.
    for (path, mode, gid, text) in [
        ("etc/passwd", 0o644, 0, accounts.passwd()),
        ("etc/group", 0o644, 0, accounts.group()),
        ("etc/shadow", 0o640, 42, accounts.shadow(day)),
        ("etc/gshadow", 0o640, 42, accounts.gshadow()),
    ] {
        installer.file_of_group(path, mode, gid, text.as_bytes())?;
    }
    Ok(())
}

fn pam(installer: &mut Installer<'_, '_>) -> Result<(), tree::Error> {
    for name in ["auth", "account", "password", "session", "session-noninteractive"] {
        let Some(template) = installer.kept(&format!("usr/share/pam/common-{name}")) else { continue };
        let mut text = String::new();
        for line in template.lines() {
            match PAM_BLOCKS.iter().find(|(mark, _)| line == *mark) {
                Some((_, "")) => {}
                Some((_, block)) => text.extend([block, "\n"]),
                None => text.extend([line, "\n"]),
            }
        }
        installer.file(&format!("etc/pam.d/common-{name}"), 0o644, text.as_bytes())?;
    }
    PAM_SAVED
        .iter()
        .try_for_each(|(name, text)| installer.file(&format!("var/lib/pam/{name}"), 0o644, text.as_bytes()))
}

/// Lets `modprobe` find modules before the kernel package's script has run depmod; answers the initial RAM disk of the last kernel,
/// if it needs one.
fn kernel_modules(installer: &mut Installer<'_, '_>, init: &[u8]) -> Result<Option<Vec<u8>>, Error> {
    let kept = &mut installer.root.kept;
    let mut kernels: BTreeMap<String, Vec<(String, Vec<u8>)>> = BTreeMap::new();
    for path in kept.keys().filter(|path| modules::is_module(path)).cloned().collect::<Vec<_>>() {
        let mut parts = path.splitn(5, '/').skip(3).map(str::to_owned);
        if let (Some(version), Some(rest), Some(bytes)) = (parts.next(), parts.next(), kept.remove(&path)) {
            kernels.entry(version).or_default().push((rest, bytes));
        }
    }
    let mut initrd = None;
    for (version, files) in kernels {
        let directory = format!("usr/lib/modules/{version}");
        let builtin = installer.kept(&format!("{directory}/modules.builtin")).unwrap_or_default();
        let modules = modules::read_all(&files);
        for (name, bytes) in modules::indices(&modules, &builtin) {
            installer.file(&format!("{directory}/{name}"), 0o644, &bytes)?;
        }
        initrd = initramfs::make(init, &modules, &files)?;
    }
    Ok(initrd)
}

/// Writes records (dpkg's database) into the tree.
pub fn install_records(
    root: &mut Root<'_>,
    records: &[crate::dpkg::Record],
    time: i64,
) -> Result<(), tree::Error> {
    let mut installer = Installer { root, names: Vec::new(), time, own: Vec::new() };
    records.iter().try_for_each(|(path, mode, bytes)| installer.file(path, *mode, bytes))
}
