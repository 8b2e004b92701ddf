//! `mount.pagefold`, which `mount -t pagefold`, fstab and systemd's mount units call:
//!
//! ```text
//! mount.pagefold ROOT TARGET [-sfnv] [-N namespace] [-o option[,option...]] [-t type]      (mount(8), "External helpers")
//! ```
//!
//! Invariant: it only translates into arguments of `pagefold mount`; there is no second way to mount. Options that only
//! concern mount(8) and fstab are dropped, unknown ones are refused: an option that was meant to restrict must not vanish.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

/// Options of fstab and mount(8) that don't reach a file system.
const FOR_OTHERS: [&str; 13] = [
    "defaults", "rw", "auto", "noauto", "nofail", "_netdev", "user", "nouser", "users", "owner", "group",
    "exec", "suid",
];

/// Whether the program was called as the helper.
#[must_use]
pub fn is_helper(argv0: &OsStr) -> bool {
    Path::new(argv0).file_name().is_some_and(|name| name == "mount.pagefold")
}

/// The arguments of `pagefold` that do what the helper's arguments ask for; `args` starts after the program's name.
///
/// # Errors
/// What is wrong with them, in words.
pub fn translate(args: &[OsString]) -> Result<Vec<OsString>, String> {
    let (mut names, mut out) = (Vec::new(), vec![OsString::from("pagefold"), OsString::from("mount")]);
    let mut fake = false;
    let mut rest = args.iter();
    while let Some(arg) = rest.next() {
        let bytes = arg.as_bytes();
        match bytes {
            b"-o" | b"-t" | b"-N" => {
                let value = rest.next().ok_or_else(|| format!("{} needs a value", arg.to_string_lossy()))?;
                match bytes {
                    b"-o" => options(value, &mut out)?,
                    b"-N" => return Err("mounting in another namespace (-N) is not supported".into()),
                    _ => {}
                }
            }
            [b'-', flags @ ..] if !flags.is_empty() && flags.iter().all(|f| b"sfnv".contains(f)) => {
                fake |= flags.contains(&b'f');
            }
            [b'-', ..] => return Err(format!("unknown argument {}", arg.to_string_lossy())),
            _ => names.push(arg.clone()),
        }
    }
    let [root, target] = &names[..] else {
        return Err("usage: mount.pagefold ROOT TARGET [-sfnv] [-o options]".into());
    };
    if fake {
        // Everything was understood, which is all that a fake mount asks.
        return Ok(vec!["pagefold".into(), "--version".into()]);
    }
    // mount(8) takes a view for another one than fstab's, for its type and source are overlayfs': `mount -a` comes here each time.
    out.extend(["--helper".into(), "--".into(), root.clone(), target.clone()]);
    Ok(out)
}

fn options(list: &OsStr, out: &mut Vec<OsString>) -> Result<(), String> {
    for option in list.as_bytes().split(|b| *b == b',').filter(|o| !o.is_empty()) {
        let (name, value) = match option.iter().position(|b| *b == b'=') {
            Some(at) => (&option[..at], Some(&option[at + 1..])),
            None => (option, None),
        };
        let name = String::from_utf8_lossy(name);
        match (&*name, value) {
            ("ro" | "force", None) => out.push(format!("--{name}").into()),
            ("store" | "idmap" | "charge", Some(value)) => {
                let mut arg = OsString::from(format!("--{name}="));
                arg.push(OsString::from_vec(value.to_vec()));
                out.push(arg);
            }
            // A view always inherits these from where its root is; asking for them where the root has them is no news.
            (name, _) if name.starts_with("x-") || name.starts_with("comment") => {}
            (name, None) if FOR_OTHERS.contains(&name) => {}
            _ => {
                return Err(format!(
                    "unknown option {}: a view takes ro, force, store=DIR, idmap=MAP and charge=pagefold; nosuid, nodev and \
                     noexec come from the mount that the root is on",
                    String::from_utf8_lossy(option)
                ));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<OsString> {
        text.split_whitespace().map(OsString::from).collect()
    }

    #[test]
    fn what_mount_and_fstab_say_becomes_a_mount() {
        let translated =
            translate(&words("/srv/a /views/a -s -o rw,noauto,x-systemd.requires=b,store=/s,ro -t pagefold"));
        assert_eq!(translated, Ok(words("pagefold mount --store=/s --ro --helper -- /srv/a /views/a")));
        assert_eq!(translate(&words("a b -fnv")), Ok(words("pagefold --version")));
        assert_eq!(translate(&words("a b -n")), Ok(words("pagefold mount --helper -- a b")));
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for (bad, named) in [
            ("a", "usage"),
            ("a b c", "usage"),
            ("a b -o", "-o needs"),
            ("a b -o nosuid", "nosuid"),
            ("a b -o ro=1", "ro=1"),
            ("a b -N 3", "-N"),
            ("a b --ro", "--ro"),
        ] {
            let told = translate(&words(bad)).expect_err(bad);
            assert!(told.contains(named), "{bad}: {told}");
        }
        assert!(is_helper(OsStr::new("/sbin/mount.pagefold")) && !is_helper(OsStr::new("/usr/bin/pagefold")));
    }
}
